"""Optimizer steps: schedule, reference, state, and what happens when a number is not finite."""

import math
from copy import deepcopy

import pytest
import torch
from helpers import assert_same_bits
from losses import LossOf

from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.trainer.checkpoint_writer import CheckpointWriter
from samebit.trainer.config import GrpoConfig
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import NonFiniteError


@pytest.fixture
def batches(random_samples):
    """Three micro-batches of four samples or so each."""
    samples = random_samples(10, seed=6, with_logprobs=True)
    batches = pack_samples(samples, 110)
    assert len(batches) >= 3
    return batches


def rates(trainer, batches, num_steps):
    return [trainer.train_step(batches[:1], Sft()).learning_rate for _ in range(num_steps)]


def test_constant_rate(make_trainer, batches):
    """No schedule: the same rate from the first step on."""
    assert rates(make_trainer(lr=1e-3), batches, 3) == [1e-3] * 3


def test_warm_up_and_decay(make_trainer, batches):
    """Megatron's schedule: linear from 0 over the warm-up, then down to min_lr at the end."""
    settings = {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_steps": 2, "num_steps": 6}
    warm = [0.0, 5e-4, 1e-3]
    found = rates(make_trainer(lr_schedule="linear", **settings), batches, 7)
    assert found == pytest.approx([*warm, 7.75e-4, 5.5e-4, 3.25e-4, 1e-4])
    found = rates(make_trainer(lr_schedule="cosine", **settings), batches, 7)
    half = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(1, 5)]
    assert found == pytest.approx([*warm, *(1e-4 + 9e-4 * x for x in half)])
    del settings["min_lr"]
    found = rates(make_trainer(lr_schedule="constant", **settings), batches, 5)
    assert found == pytest.approx([*warm, 1e-3, 1e-3])


def test_a_schedule_counts_optimizer_steps(make_trainer, batches):
    """Not micro-batches and not samples, of which a step has any number; and not from the end."""
    settings = {"lr": 1e-3, "lr_warmup_steps": 1, "num_steps": 5, "lr_schedule": "linear"}
    trainer = make_trainer(**settings)
    found = [
        trainer.train_step(some, Sft()).learning_rate
        for some in (batches, batches[:1], batches[1:], batches, batches, batches[:2])
    ]
    assert found == pytest.approx([0.0, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0.0])


def test_a_rate_is_used_in_the_step_that_reports_it(make_trainer, batches):
    """The first step of a warm-up, at rate 0, moves nothing; a second one does."""
    trainer = make_trainer(lr=1e-3, lr_warmup_steps=2)
    seen = [trainer.digest()]
    for _ in range(2):
        trainer.train_step(batches, Sft())
        seen.append(trainer.digest())
    assert seen[0] == seen[1] != seen[2]


def test_a_warm_up_longer_than_the_run_is_possible(make_trainer, batches):
    """A short trial of a long configuration must start."""
    trainer = make_trainer(lr=1e-3, lr_warmup_steps=10, lr_schedule="cosine", num_steps=2)
    assert rates(trainer, batches, 2) == pytest.approx([0.0, 1e-4])


def test_rate_zero_changes_nothing(make_trainer, batches):
    """A step without a rate must keep every bit, decay or not."""
    trainer = make_trainer(lr=0.0, weight_decay=0.1)
    before = trainer.digest()
    stats = trainer.train_step(batches, Grpo())
    assert stats.grad_norm > 0
    assert trainer.digest() == before
    assert trainer.step == 1


def test_a_step_changes_every_parameter(make_trainer, model_path, batches):
    """A parameter that Megatron's buffers forgot would stay at its start for ever."""
    trainer = make_trainer(model_path)
    before = {name: p.detach().clone() for name, p in trainer.params.items()}
    trainer.train_step(batches, Sft())
    still = [name for name, p in trainer.params.items() if torch.equal(p, before[name])]
    assert still == []


def test_steps_repeat_to_the_bit(make_trainer, batches):
    """Two equal runs give the same bytes."""
    a, b = make_trainer(), make_trainer()
    for _ in range(3):
        first, second = (t.train_step(batches, Grpo()) for t in (a, b))
        assert first == second
        assert a.digest() == b.digest()


def test_several_trainers_do_not_touch_each_other(make_trainer, batches):
    """Megatron keeps state per process; our objects must not share any of it."""
    a, b = make_trainer(), make_trainer(lr=1e-3, num_steps=4)
    before = b.digest()
    a.train_step(batches, Sft())
    assert b.digest() == before
    alone = make_trainer(lr=1e-3, num_steps=4)
    alone.train_step(batches, Sft())
    b.train_step(batches, Sft())
    assert b.digest() == alone.digest()


def test_the_reference_stays_where_it_was_frozen(make_trainer, batches):
    """KL is measured against the weights at the start, to the bit, and is 0 there."""
    loss = Grpo(GrpoConfig(kl_coef=0.1, kl_estimator="k3"))
    trainer = make_trainer()
    with pytest.raises(RuntimeError, match="freeze_reference"):
        trainer.logprobs(batches, reference=True)
    trainer.freeze_reference()
    start = trainer.logprobs(batches)
    assert trainer.train_step(batches, loss).metrics["train/kl"] == 0.0
    stats = trainer.train_step(batches, loss)
    assert stats.metrics["train/kl"] > 0
    for now, then in zip(trainer.logprobs(batches, reference=True), start, strict=True):
        assert_same_bits(now, then)
    assert not torch.equal(trainer.logprobs(batches)[0], start[0])


def test_each_micro_batch_gets_its_own_reference(make_trainer, batches):
    """Reference log-probs of another micro-batch would be a random penalty."""
    seen = []

    @LossOf
    def loss(logprobs, reference, batch):
        seen.append((batch.index, reference))
        return -logprobs, {}

    trainer, loss.needs_reference = make_trainer(), True
    trainer.freeze_reference()
    expected = trainer.logprobs(batches)
    trainer.train_step(batches, loss)
    assert [index for index, _ in seen] == [b.index for b in batches]
    for (_, reference), own in zip(seen, expected, strict=True):
        assert_same_bits(reference, own)


def test_the_kl_penalty_pulls_back(make_trainer, batches):
    """With a large weight the policy stays nearer to the reference."""
    distances = []
    for config in (GrpoConfig(), GrpoConfig(kl_coef=10.0, kl_estimator="k2")):
        trainer = make_trainer(lr=1e-3)
        trainer.freeze_reference()
        start = torch.cat(trainer.logprobs(batches))
        for _ in range(6):
            trainer.train_step(batches, Grpo(config))
        distances.append(float((torch.cat(trainer.logprobs(batches)) - start).square().mean()))
    assert distances[1] < 0.5 * distances[0]


def assert_same_state(found, expected, path=""):
    """Every tensor of two states has the same bits, every other value is equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key, value in expected.items():
            assert_same_state(found[key], value, f"{path}.{key}")
    elif torch.is_tensor(expected):
        assert_same_bits(found, expected, path)
    else:
        assert found == expected, path


def nan_loss_of(sample_id, value):
    @LossOf
    def loss(logprobs, reference, batch):
        ids = torch.tensor([s.sample_id for s in batch.samples])
        bad = ids[batch.sample_of_row] == sample_id
        return torch.where(bad, value, -logprobs), {}

    return loss


def nan_gradient_of(index):
    """A finite loss whose gradient is not a number in one micro-batch."""

    @LossOf
    def loss(logprobs, reference, batch):
        losses = -logprobs
        if batch.index == index:
            losses = losses + (logprobs - logprobs.detach()).abs().sqrt()
        return losses, {}

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_anything_is_written(make_trainer, batches, value):
    """The error names step, micro-batch and sample, and the weights are still good."""
    trainer, other = make_trainer(), make_trainer()
    for t in (trainer, other):
        t.train_step(batches, Sft())
    before, bad = deepcopy(trainer.state_dict()), batches[1].samples[1].sample_id
    message = f"loss is NaN or Inf at step 2, micro-batch 1, sample {bad}; the weights are unch"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train_step(batches, nan_loss_of(bad, value))
    assert_same_state(trainer.state_dict(), before)
    assert trainer.step == 1
    # What was accumulated before the error must not count in the next step.
    trainer.train_step(batches, Sft())
    other.train_step(batches, Sft())
    assert trainer.digest() == other.digest()


def test_a_poll_ends_a_step_before_anything_is_written(make_trainer, batches):
    """It is asked before every micro-batch, and never once the optimizer has begun to write."""
    trainer, polls = make_trainer(), []

    def poll():
        polls.append(1)
        if len(polls) == 3:
            raise KeyboardInterrupt

    before = deepcopy(trainer.state_dict())
    with pytest.raises(KeyboardInterrupt):
        trainer.train_step(batches, Sft(), poll)
    assert_same_state(trainer.state_dict(), before)
    assert (trainer.step, len(polls)) == (0, 3)
    make_trainer().train_step(batches, Sft(), poll)
    assert len(polls) == 3 + len(batches)


def test_the_first_of_several_bad_samples_is_named(make_trainer, batches):
    """The one to look at: what comes after may be bad because of it."""
    first, last = batches[0].samples[1].sample_id, batches[2].samples[0].sample_id

    @LossOf
    def loss(logprobs, reference, batch):
        ids = torch.tensor([s.sample_id for s in batch.samples])[batch.sample_of_row]
        return torch.where((ids == first) | (ids == last), math.nan, -logprobs), {}

    with pytest.raises(NonFiniteError, match=f"micro-batch 0, sample {first}; the weights"):
        make_trainer().train_step(batches, loss)


def test_a_gradient_that_is_not_finite_stops_before_anything_is_written(make_trainer, batches):
    """As for the loss; the micro-batch is found among several."""
    trainer, other = make_trainer(), make_trainer()
    for t in (trainer, other):
        t.train_step(batches, Sft())
    before, ids = deepcopy(trainer.state_dict()), [s.sample_id for s in batches[2].samples]
    message = rf"at step 2, micro-batch 2, sample {ids[0]}; the weights are unchanged"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train_step(batches, nan_gradient_of(2))
    assert_same_state(trainer.state_dict(), before)
    assert trainer.step == 1
    trainer.train_step(batches, Sft())
    other.train_step(batches, Sft())
    assert trainer.digest() == other.digest()


def test_gradients_that_overflow_only_together_are_found_too(make_trainer, batches):
    """Each micro-batch is finite, their sum is not: there is no one to blame, but it stops."""

    scale = 1e30

    @LossOf
    def huge(logprobs, reference, batch):
        return -logprobs * scale, {}

    def step_until_it_overflows():
        nonlocal scale
        while True:
            trainer.train_step(batches[:1] * 8, huge)
            scale *= 2

    trainer = make_trainer(lr=0.0)
    before = trainer.digest()
    with pytest.raises(NonFiniteError, match="gradient.* overflows at step"):
        step_until_it_overflows()
    assert trainer.digest() == before


SETTINGS = {
    "plain": {},
    "decay": {"lr_schedule": "cosine", "lr_warmup_steps": 2, "num_steps": 6, "weight_decay": 0.1},
}


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_loaded_checkpoint_continues_to_the_bit(
    make_trainer, batches, tmp_path, settings, kl_coef
):
    """Parameters, moments, schedule and reference: whatever is forgotten shows in a digest."""
    loss = Grpo(GrpoConfig(kl_coef=kl_coef))

    def make(filled=True):
        trainer = make_trainer(filled=filled, **SETTINGS[settings])
        if kl_coef and filled:
            trainer.freeze_reference()
        return trainer

    trainer = make()
    for _ in range(2):
        trainer.train_step(batches, loss)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(trainer.step, trainer.state_dict(), {})
    saved = trainer.digest()
    expected = [(trainer.train_step(batches, loss), trainer.digest()) for _ in range(3)]
    writer.finish()
    fresh = make(filled=False)
    fresh.load_state_dict(latest_checkpoint(tmp_path).load())
    assert (fresh.step, fresh.digest()) == (2, saved)
    assert [(fresh.train_step(batches, loss), fresh.digest()) for _ in range(3)] == expected
    # A trainer that has already gone elsewhere comes back to the same place.
    fresh.load_state_dict(latest_checkpoint(tmp_path).load())
    assert [(fresh.train_step(batches, loss), fresh.digest()) for _ in range(3)] == expected


def test_state_of_another_model_is_refused(make_trainer, llama_path, qwen3_path):
    """Loading half of a state would leave a mixture of two models."""
    state = make_trainer(qwen3_path).state_dict()
    with pytest.raises((KeyError, RuntimeError, ValueError)):
        make_trainer(llama_path).load_state_dict(state)


def test_no_samples_is_an_error(make_trainer):
    """A step on nothing would divide by zero."""
    with pytest.raises(ValueError):
        make_trainer().train_step([], Sft())


def test_the_sample_behind_a_bad_gradient_is_named(make_trainer, batches):
    """Not only its micro-batch: a user has to find the data."""
    bad = batches[2].samples[1].sample_id

    @LossOf
    def loss(logprobs, reference, batch):
        ids = torch.tensor([s.sample_id for s in batch.samples])[batch.sample_of_row]
        losses = -logprobs
        rows = torch.nonzero(ids == bad).squeeze(1)
        kink = (logprobs[rows] - logprobs[rows].detach()).abs().sqrt()
        return losses.index_add(0, rows, kink), {}

    with pytest.raises(NonFiniteError, match=f"micro-batch 2, sample {bad}; the weights"):
        make_trainer().train_step(batches, loss)


def test_the_sample_behind_a_bad_gradient_is_named_at_its_temperature(make_trainer, batches):
    """And with its reference: each sample alone has the numbers that it has among others."""
    cold = pack_samples([s for b in batches for s in b.samples], 110, temperature=0.5)
    trainer = make_trainer()
    trainer.freeze_reference()
    expected = torch.cat(trainer.logprobs(cold))
    bad, place = cold[1].samples[1].sample_id, len(cold[0].rows) + cold[1].samples[0].num_trained

    @LossOf
    def loss(logprobs, reference, batch):
        alike = (logprobs.detach() == expected[place]) & (reference == expected[place])
        rows = torch.nonzero(alike).squeeze(1)
        kink = (logprobs[rows] - logprobs[rows].detach()).abs().sqrt()
        return (-logprobs).index_add(0, rows, kink), {}

    loss.needs_reference = True
    with pytest.raises(NonFiniteError, match=f"micro-batch 1, sample {bad}; the weights"):
        trainer.train_step(cold, loss)
