"""A GRPO step against a plain program: transformers' model in fp64, one sample at a time."""

from dataclasses import replace

import pytest
import torch

from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.config import GrpoConfig
from samebit.trainer.packing import pack_samples
from samebit.weight_sync.mapping import load_params, parts_of

TEMPERATURE = 0.7
CONFIG = GrpoConfig(clip_ratio_low=0.1, clip_ratio_high=0.3, kl_coef=0.4, kl_estimator="k3")


def reference_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    )


def distribution(model, sample):
    """Log-probs [response, vocabulary] before each token of the response."""
    logits = model(torch.tensor(sample.token_ids[None])).logits[0]
    return (logits / TEMPERATURE).log_softmax(-1)[-sample.num_trained - 1 : -1]


def drawn(logprobs, sample):
    targets = torch.tensor(sample.token_ids[-sample.num_trained :])
    return logprobs[torch.arange(len(targets)), targets]


class Plain:
    """Loss and metrics of samples, written down once more."""

    def __init__(self, model, reference, samples, loss_mean):
        self.losses, self.clipped, self.kl, self.ratio, self.entropy = [], [], [], [], []
        for sample in samples:
            probs = distribution(model, sample)
            logprobs = drawn(probs, sample)
            with torch.no_grad():
                against = drawn(distribution(reference, sample), sample)
            losses = []
            advantage = float(sample.advantages[-1])
            before = sample.logprobs[-sample.num_trained :].tolist()
            for i, logprob in enumerate(logprobs):
                ratio = (logprob - before[i]).exp()
                bounded = ratio.clamp(0.9, 1.3) * advantage
                clips = bool(bounded < ratio * advantage)
                d = logprob - against[i]
                kl = (-d).exp() - 1 + d  # k3
                losses.append(-(bounded if clips else ratio * advantage) + 0.4 * kl)
                self.clipped.append(float(clips))
                self.kl.append(kl.item())
                self.ratio.append(ratio.item())
                self.entropy.append(-(probs[i].exp() * probs[i]).sum().item())
            self.losses.append(torch.stack(losses))
        if loss_mean == "token":
            self.loss = torch.cat(self.losses).mean()
        else:
            self.loss = torch.stack([each.mean() for each in self.losses]).mean()


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_a_step_is_that_of_a_plain_program(make_trainer, random_samples, model_path, loss_mean):
    """Advantages, ratio, clipping, KL, entropy and temperature, over three micro-batches: loss,
    gradient and every figure that is reported."""
    trainer = make_trainer(model_path, lr=0.0, clip_grad=0)
    reference, model = reference_model(model_path), reference_model(model_path)
    with torch.no_grad():
        for p in (*reference.parameters(), *trainer.params.values()):
            p.mul_(0.95)
    trainer.freeze_reference()
    hf = {name: p.detach() for name, p in model.named_parameters()}
    trainer.fill(lambda specs, params: load_params(specs, params, parts_of(hf.__getitem__)))
    generator = torch.Generator().manual_seed(3)
    samples = []
    for sample in random_samples(6, seed=5):
        with torch.no_grad():
            own = drawn(distribution(model, sample), sample)
        shift = 0.4 * torch.randn(len(own), generator=generator)  # ratios on both sides of a bound
        advantage = 2 * float(torch.rand((), generator=generator)) - 1
        samples.append(
            replace(sample.with_logprobs((own + shift).float().tolist()), advantages=advantage)
        )
    batches = pack_samples(samples, 50, loss_mean, TEMPERATURE)
    assert len(batches) >= 3
    stats = trainer.train_step(batches, Grpo(CONFIG))
    plain = Plain(model, reference, samples, loss_mean)
    plain.loss.backward()
    assert 0.1 < sum(plain.clipped) / len(plain.clipped) < 0.9
    assert stats.loss == pytest.approx(float(plain.loss), rel=1e-5)
    count = len(plain.ratio)
    assert stats.metrics.keys() == {
        *("train/ratio", "train/clip_fraction", "train/kl", "train/entropy")
    }
    for name, values in (
        ("train/ratio", plain.ratio),
        ("train/clip_fraction", plain.clipped),
        ("train/kl", plain.kl),
        ("train/entropy", plain.entropy),
    ):
        assert stats.metrics[name] == pytest.approx(sum(values) / count, rel=1e-4), name
    assert stats.logprob_tokens_compared == count == stats.logprob_mismatches
    differences = [abs(x) for x in torch.tensor(plain.ratio).log().tolist()]
    assert stats.logprob_abs_diff_max == pytest.approx(max(differences), rel=1e-3)
    expected = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in trainer.specs}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    load_params(trainer.specs, expected, parts_of(gradients.__getitem__))
    for name, p in trainer.params.items():
        error = (p.main_grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, (name, float(error))
    # Tied embeddings count once, and so does every other parameter.
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-5)
