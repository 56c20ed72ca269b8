"""On-policy distillation: advantages by hand, and the gradient of the reverse KL that they give."""

from dataclasses import replace

import pytest
import torch

from samebit.kernels.top_tokens import top_tokens
from samebit.trainer.algorithms.distillation import Distillation, DistillationConfig
from samebit.trainer.algorithms.policy_gradient import clipped_surrogate
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import Sample
from samebit.weight_sync.mapping import load_params, parts_of

CONFIG = DistillationConfig(name="distillation")


def test_advantages_by_hand():
    """How much likelier the teacher finds each drawn token; no reward is read."""
    sample = Sample(sample_id=0, token_ids=range(5), loss_mask=[0, 1, 0, 1, 1])
    sample = sample.with_logprobs([-1.0, -2.0, -0.5])
    sample = replace(sample, teacher_logprobs=[0.0, -0.25, -9.0, -4.0, -0.5])
    algorithm = Distillation(CONFIG)
    assert algorithm.needs_teacher
    for reward in (0.0, 7.0):
        [[found]] = algorithm.advantages(torch.tensor([[reward]]), [[sample]])
        assert found[sample.loss_mask].tolist() == pytest.approx([0.75, -2.0, 0.0], abs=1e-6)


def test_its_mean_gradient_is_the_reverse_kls():
    """The mean over all tokens that could be drawn, by their probabilities, in fp64: that of
    KL(policy || teacher), written down."""
    generator = torch.Generator().manual_seed(6)
    policy, teacher = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    logits, theirs = policy.requires_grad_(), teacher.log_softmax(-1)
    own = logits.log_softmax(-1)
    drawn, advantages = own.detach(), (theirs - own).detach()
    losses, _ = clipped_surrogate(own - drawn, advantages, CONFIG)
    [found] = torch.autograd.grad((drawn.exp() * losses).sum(), logits)
    own = logits.log_softmax(-1)
    [expected] = torch.autograd.grad((own.exp() * (own - theirs)).sum(), logits)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert found.abs().max() > 0.01


def test_a_step_by_likeliest_tokens_is_that_of_a_plain_program(
    make_trainer, random_samples, model_path
):
    """KL over the teacher's four likeliest tokens and the rest, in fp64, at the rollout's
    temperature, of several micro-batches: loss, figures, every gradient."""
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(model_path, clip_grad=0.0)
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float64, attn_implementation="eager"
    )
    generator, samples, kls = torch.Generator().manual_seed(3), [], []
    for sample in random_samples(6, 5):
        teacher = 2 * torch.randn(sample.num_trained, trainer.model.vocab_size, generator=generator)
        top = top_tokens(teacher, 4)
        samples.append(replace(sample.with_logprobs([-6.0] * len(teacher)), teacher_top=top))
        logits = model(torch.tensor(sample.token_ids[None])).logits[0, :-1] / 0.7
        own, theirs = (x.softmax(-1) for x in (logits[sample.loss_mask[1:]], teacher.double()))
        chosen = [x.gather(1, top.token_ids.long()) for x in (own, theirs)]
        p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in chosen)
        kls.append((p * (p / q).log()).sum(1))
    loss = torch.cat(kls).mean()
    loss.backward()
    batches = pack_samples(samples, 60, "token", 0.7)
    assert len(batches) >= 3
    algorithm = Distillation(DistillationConfig(name="distillation", loss_top_k=4))
    assert (algorithm.teacher_top_k, Distillation(CONFIG).teacher_top_k) == (4, 0)
    stats = trainer.train_step(batches, algorithm)
    assert stats.loss == pytest.approx(loss.item(), rel=1e-6)
    assert stats.metrics["train/reverse_kl"] == pytest.approx(loss.item(), rel=1e-6)
    expected = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in trainer.specs}
    gradients = {name: x.grad for name, x in model.named_parameters()}
    load_params(trainer.specs, expected, parts_of(gradients.__getitem__))
    for name, x in trainer.params.items():
        error = (x.main_grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, (name, float(error))


def test_likeliest_tokens_of_other_places_are_refused(random_samples):
    """Of fewer places than tokens that are trained on; and of some samples alone."""
    [one, other] = random_samples(2, 5)
    top = top_tokens(torch.zeros(one.num_trained, 9), 2)
    message = f"sample 100: teacher_top of {one.num_trained - 1} places for {one.num_trained} tok"
    with pytest.raises(ValueError, match=message):
        replace(one, teacher_top=top.select(slice(1, None)))
    with pytest.raises(ValueError, match="have a teacher_top and some have none"):
        pack_samples([replace(one, teacher_top=top), other], 1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length_penalty": "relative"}, "algorithm.length_penalty is 'relative'; it must be"),
        ({"kl_coef": 0.1, "kl_in": "reward"}, "algorithm.kl_in is 'reward'; it must be loss: adv"),
        ({"loss_top_k": -1}, "algorithm.loss_top_k is -1; it must be at least 0"),
        ({"loss_top_k": 3, "clip_ratio_low": 0.1}, "nothing reads it where algorithm.loss_top_k"),
        ({"loss_top_k": 3, "tis_clip": 2.0}, "nothing reads it where algorithm.loss_top_k is set"),
    ],
)
def test_what_nothing_would_read_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(name="distillation", **settings)
