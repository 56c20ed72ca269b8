"""What a loss may ask for, against transformers in fp64; and algorithms by their names."""

import re
from dataclasses import replace

import pytest
import torch
from losses import LossOf, SequenceRatio

from samebit.recipes.run.batches import own_micro_batches
from samebit.trainer.algorithms.base import Algorithm
from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.algorithms.registry import ALGORITHMS, find_algorithm, make_algorithm
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import AlgorithmConfig, GrpoConfig, TrainerConfig
from samebit.trainer.context import in_rows, sample_sums
from samebit.trainer.packing import pack_samples
from samebit.weight_sync.mapping import load_params, parts_of

TEMPERATURE = 0.7


def reference_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    )


def scored_samples(random_samples, seed):
    """With log-probs near those of a random model, so that ratios are of the order of 1."""
    generator = torch.Generator().manual_seed(seed)
    return [
        replace(
            s.with_logprobs((-6 + torch.randn(s.num_trained, generator=generator)).tolist()),
            advantages=0.8 - 0.3 * i,
        )
        for i, s in enumerate(random_samples(6, seed))
    ]


def test_entropies_and_sums_of_samples_are_differentiated(make_trainer, random_samples, model_path):
    """The ratio of whole samples and a bonus for entropy: loss, gradients and figures."""
    trainer, model = make_trainer(model_path, clip_grad=0.0), reference_model(model_path)
    samples = scored_samples(random_samples, seed=5)
    losses, ratios, entropies = [], [], []
    for sample in samples:
        logits = model(torch.tensor(sample.token_ids[None])).logits[0] / TEMPERATURE
        rows = logits.log_softmax(-1)[:-1][sample.loss_mask[1:]]
        targets = torch.tensor(sample.token_ids[sample.loss_mask])
        chosen = rows.gather(1, targets[:, None]).squeeze(1)
        before = torch.tensor(sample.logprobs[sample.loss_mask])
        ratio, entropy = (chosen - before).mean().exp(), -(rows.exp() * rows).sum(-1)
        losses.append(-ratio * float(sample.advantages[-1]) - 0.3 * entropy.mean())
        ratios += [ratio.item()] * len(chosen)
        entropies += entropy.tolist()
    loss = torch.stack(losses).mean()
    loss.backward()
    batches = pack_samples(samples, 60, "sequence", TEMPERATURE)
    assert len(batches) >= 3
    stats = trainer.train_step(batches, SequenceRatio())
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    figures = {"train/sequence_ratio": ratios, "train/entropy": entropies}
    for name, values in figures.items():
        assert stats.metrics[name] == pytest.approx(sum(values) / len(values), rel=1e-5), name
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-5)
    expected = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in trainer.specs}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    load_params(trainer.specs, expected, parts_of(gradients.__getitem__))
    for name, p in trainer.params.items():
        error = (p.main_grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, (name, float(error))


def test_sums_of_samples_by_hand(random_samples):
    """Back in rows, each has its sample's; a function of it gives every row the same gradient."""
    [batch] = pack_samples(random_samples(5, seed=1), 1000)
    values = torch.randn(len(batch.rows), generator=torch.Generator().manual_seed(0))
    leaf, places = values.clone().requires_grad_(), torch.arange(len(values))
    sums = sample_sums(leaf, batch)
    found = in_rows(sums, batch)
    [grad] = torch.autograd.grad((found * places).sum(), leaf)
    assert sums.shape == (5,)
    for i in range(5):
        rows = batch.sample_of_row == i
        torch.testing.assert_close(sums[i], values[rows].double().sum().float())
        assert (found[rows] == sums[i]).all()
        assert (grad[rows] == places[rows].sum()).all()
    wide = values.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: in_rows(sample_sums(x, batch).sin(), batch), wide)


def test_entropies_have_gradients_only_where_they_are_asked_for(make_trainer, random_samples):
    """The step of a loss without them has the bits that it has beside one with them."""
    batches = pack_samples(random_samples(6, seed=2, with_logprobs=True), 100)
    seen, entropies = [], []

    class Plain(Grpo):
        def loss(self, inputs):
            seen.append(inputs.entropies.requires_grad)
            return super().loss(inputs)

    class Asking(Plain):
        needs_entropy_grad = True

    found = []
    for algorithm in (Plain(), Asking()):
        trainer = make_trainer()
        figures = vars(trainer.train_step(batches, algorithm))
        entropies.append(figures["metrics"].pop("train/entropy"))
        found.append((figures, trainer.digest()))
    assert seen == [False] * len(batches) + [True] * len(batches)
    assert found[0] == found[1]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-6)


@pytest.mark.parametrize("name", ["losses", "train/own"])
def test_a_loss_or_metric_of_another_shape_is_refused(make_trainer, random_samples, name):
    """One number would be taken for every row's, or for the sum of all."""
    trainer, batches = make_trainer(), pack_samples(random_samples(2, seed=1), 1000)
    before, rows = trainer.digest(), len(batches[0].rows)

    @LossOf
    def loss(logprobs, reference, batch):
        found = {"losses": -logprobs, "train/own": logprobs.detach()}
        found[name] = found[name].mean()
        return found.pop("losses"), found

    message = rf"LossOf.loss returned {name} of shape \(\) for {rows} loss rows"
    with pytest.raises(ValueError, match=message):
        trainer.train_step(batches, loss)
    assert trainer.digest() == before


def test_a_run_has_the_loss_mean_of_its_settings(make_trainer, random_samples):
    settings = TrainerConfig(loss_mean="constant", loss_mean_tokens=8)
    [batch] = own_micro_batches(random_samples(2, seed=1), settings, make_trainer())
    assert batch.loss_weights.eq(0.125).all()
    assert batch.loss_denominator == 2


def test_every_registered_algorithm_is_made_of_its_settings():
    for name in ALGORITHMS:
        algorithm = make_algorithm(find_algorithm(name).Config(name=name))
        assert isinstance(algorithm, Algorithm)
    grpo = make_algorithm(GrpoConfig(kl_coef=0.5))
    assert isinstance(grpo, Grpo)
    assert (grpo.config.kl_coef, grpo.needs_reference) == (0.5, True)
    assert not make_algorithm(GrpoConfig()).needs_reference
    assert isinstance(make_algorithm(AlgorithmConfig(name="losses:SequenceRatio")), SequenceRatio)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grop", "algorithm.name is 'grop'; it must be one of ('grpo', 'gspo', 'cispo', 'rloo', "),
        ("none:Such", "algorithm.name is 'none:Such', which cannot be imported: No module named"),
        ("losses:Such", "algorithm.name is 'losses:Such', which cannot be imported: module"),
        (
            "losses:LossOutputs",
            "it must be a subclass of samebit.trainer.algorithms.base:Algorithm",
        ),
        ("losses:NoSettings", "it must be a class whose Config is a subclass of AlgorithmConfig"),
    ],
)
def test_a_name_that_means_no_algorithm(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_algorithm(name)


def test_settings_of_another_algorithm_are_refused():
    with pytest.raises(ValueError, match="is 'grpo', whose settings are GrpoConfig; these are Alg"):
        make_algorithm(AlgorithmConfig(name="grpo"))


def test_supervised_training_makes_no_advantages():
    with pytest.raises(NotImplementedError, match="Sft makes no advantages of rewards"):
        Sft().advantages(torch.zeros(1, 2), [])
