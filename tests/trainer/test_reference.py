"""The reference: where its weights are kept, and what takes their place."""

import pytest
import torch
from helpers import assert_same_bits

from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.checkpoint_writer import host_copy
from samebit.trainer.config import GrpoConfig, ParallelConfig
from samebit.trainer.megatron.forward import ForwardModel
from samebit.trainer.megatron.resharding import WholeState
from samebit.trainer.packing import pack_samples

LOSS = Grpo(GrpoConfig(kl_coef=0.5))
OFFLOAD = ParallelConfig(offload_reference=True)


@pytest.fixture
def batches(random_samples):
    return pack_samples(random_samples(6, seed=6, with_logprobs=True), 110)


def steps(trainer, batches, count=2):
    """Figures and weights of some steps, whose KL is to a reference."""
    return [(trainer.train_step(batches, LOSS), trainer.digest()) for _ in range(count)]


def assert_same_logprobs(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours, theirs)


def test_offload_moves_no_bit(make_trainer, batches, model_path):
    """Untied and tied: log-probs, steps and a state, which either kind takes over."""
    plain, offloaded = (make_trainer(model_path, parallel=x) for x in (None, OFFLOAD))
    for trainer in (plain, offloaded):
        trainer.freeze_reference()
    assert steps(plain, batches) == steps(offloaded, batches)
    found, expected = (t.logprobs(batches, reference=True) for t in (offloaded, plain))
    assert_same_logprobs(found, expected)
    ours, theirs = offloaded.state_dict(), plain.state_dict()
    assert ours["reference"].keys() == theirs["reference"].keys() == plain.params.keys()
    for name, kept in theirs["reference"].items():
        assert_same_bits(ours["reference"][name], kept, name)
    back, forth = (make_trainer(model_path, filled=False, parallel=x) for x in (None, OFFLOAD))
    back.load_state_dict(ours)
    forth.load_state_dict(theirs)
    other = make_trainer(model_path, filled=False, parallel=OFFLOAD)
    other.load_resharded(WholeState(plain.model, [host_copy(theirs, None)]))
    expected = steps(plain, batches)
    assert steps(back, batches) == steps(forth, batches) == steps(other, batches) == expected


def test_an_offloaded_reference_is_on_the_device_while_it_is_read(
    make_trainer, batches, monkeypatch
):
    """Not before, not after, and not after an error either."""
    trainer, seen = make_trainer(parallel=OFFLOAD), []
    trainer.freeze_reference()

    def on_device():
        return sum(p.numel() for chunk in trainer._reference._chunks for p in chunk.parameters())

    def forward(*args):
        seen.append(on_device())
        raise RuntimeError("out of memory")

    assert on_device() == 0
    trainer.logprobs(batches, reference=True)
    assert on_device() == 0
    monkeypatch.setattr(ForwardModel, "_forward", forward)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.logprobs(batches, reference=True)
    assert on_device() == 0
    assert seen == [sum(p.numel() for p in trainer.params.values())]


@pytest.mark.parametrize("parallel", [None, OFFLOAD], ids=["on the device", "on the host"])
def test_a_refreshed_reference_is_the_policy(make_trainer, batches, parallel):
    """Its log-probs are the policy's, so the next step's KL is 0; then the policy moves away."""
    trainer = make_trainer(parallel=parallel)
    trainer.freeze_reference()
    start = trainer.logprobs(batches)
    assert [figures.metrics["train/kl"] > 0 for figures, _ in steps(trainer, batches)] == [0, 1]
    trainer.freeze_reference()
    now = trainer.logprobs(batches)
    assert_same_logprobs(trainer.logprobs(batches, reference=True), now)
    assert not torch.equal(now[0], start[0])
    assert [figures.metrics["train/kl"] > 0 for figures, _ in steps(trainer, batches)] == [0, 1]
    assert_same_logprobs(trainer.logprobs(batches, reference=True), now)
