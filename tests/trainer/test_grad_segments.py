"""Gradients of segments, and the norm that no order moves, in one process."""

import math
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from losses import LossOf

from samebit.kernels.contract import tree_sum
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import ParallelConfig, check_grad_segments
from samebit.trainer.megatron import grad_norm, grad_segments
from samebit.trainer.megatron.cpu import no_cuda
from samebit.trainer.megatron.grad_norm import exact_norm
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import NonFiniteError


@pytest.fixture(scope="module")
def batches(random_samples):
    """Four segments of two or three samples, some in two micro-batches or more."""
    batches = pack_samples(random_samples(10, seed=6), 50, num_segments=4)
    assert {batch.segment for batch in batches} == {0, 1, 2, 3}
    assert len(batches) > 4
    return batches


def gradients(trainer, batches):
    with no_cuda():
        trainer._forward_backward(batches, Sft(), None)
    return torch.cat([b.grad_data for chunk in trainer._chunks for b in chunk.buffers])


@pytest.mark.parametrize(("offload", "slice_size"), [(False, 1 << 24), (True, 1000)])
def test_segments_are_added_by_one_tree(make_trainer, batches, offload, slice_size, monkeypatch):
    """One alone, beside three empty ones, is summed as micro-batches are without segments."""
    monkeypatch.setattr(grad_segments, "SLICE", slice_size)
    parallel = ParallelConfig(offload_segment_sums=offload)
    plain, trainer = make_trainer(), make_trainer(grad_segments=4, parallel=parallel)
    sums = []
    for segment in range(4):
        own = [batch for batch in batches if batch.segment == segment]
        # What the sum is divided by is 1.
        own = [replace(batch, loss_denominator=int(batch is own[0])) for batch in own]
        sums.append(gradients(trainer, own))
        assert torch.equal(sums[-1], gradients(plain, own))
    total = sum(batch.loss_denominator for batch in batches)
    whole = gradients(trainer, batches)
    assert torch.equal(whole, tree_sum(sums) / total)
    assert not torch.equal(whole, (sums[0] + sums[1] + sums[2] + sums[3]) / total)
    assert not torch.equal(whole, gradients(plain, batches))


def test_memory_of_waiting_sums(make_trainer, batches):
    """Two beside the gradients for four segments, which are released with them, or in the host's
    memory; none for one segment. Neither moves a bit of a step."""
    grads = make_trainer(releasable=True).memory_occupation()["gradients"].reserved
    expected = make_trainer(grad_segments=4).train_step(batches, Sft())
    one = make_trainer(grad_segments=1, releasable=True)
    pages = 2 * 4096  # that a tensor shares with its neighbours
    assert one.memory_occupation()["gradients"].reserved == pytest.approx(grads, abs=pages)
    for offload in (False, True):
        parallel = ParallelConfig(offload_segment_sums=offload)
        trainer = make_trainer(grad_segments=4, parallel=parallel, releasable=True)
        taken = trainer.memory_occupation()["gradients"].reserved
        assert taken == pytest.approx(grads if offload else 3 * grads, abs=3 * pages)
        assert trainer.release_memory() == {"gradients": taken}
        trainer.resume_memory()
        assert trainer.train_step(batches, Sft()) == expected


def test_a_step_that_breaks_off_leaves_nothing_behind(make_trainer, batches):
    """By a signal in the third segment, or by a gradient that is not finite, which is found."""
    trainer, other = (make_trainer(grad_segments=4) for _ in range(2))
    before, polls = deepcopy(trainer.state_dict()["params"]), []

    def poll():
        polls.append(1)
        if len(polls) == len(batches) - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train_step(batches, Sft(), poll)
    bad = batches[-2]

    @LossOf
    def loss(logprobs, reference, batch):
        kink = (logprobs - logprobs.detach()).abs().sqrt()
        return (kink if batch.index == bad.index else 0.0) - logprobs, {}

    name = bad.samples[0].sample_id
    message = f"at step 1, micro-batch {bad.index}, sample {name}; the weights are unchanged"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train_step(batches, loss)
    params = trainer.state_dict()["params"]
    assert all(torch.equal(params[key], before[key]) for key in before)
    assert trainer.train_step(batches, Sft()) == other.train_step(batches, Sft())
    assert trainer.digest() == other.digest()


@pytest.mark.parametrize("clip", [0.0, 1e9, 0.01])
def test_clipping_is_megatrons_by_the_exact_norm(make_trainer, batches, clip):
    """The gradients that AdamW is given, and the figure, are Megatron's up to the norm's rounding;
    where nothing is clipped not a bit of them moves."""
    found = []
    for exactly in (False, True):
        trainer = make_trainer(clip_grad=clip)
        gradients(trainer, batches)
        with no_cuda():
            trainer._optimizer.prepare_grads()
            norm = grad_norm.clip_gradients(trainer._optimizer, exactly)
        found.append((norm, torch.cat([p.main.grad.view(-1) for p in trainer._pieces])))
    (norm, grads), (exact, exact_grads) = found
    assert exact == pytest.approx(norm, rel=1e-6)
    assert exact > 0.1
    if clip == 0.01:
        assert float(exact_grads.double().norm()) == pytest.approx(clip, rel=1e-4)
        torch.testing.assert_close(exact_grads, grads, rtol=1e-5, atol=0)
    else:
        assert torch.equal(exact_grads, grads)


def test_the_norm_does_not_depend_on_cuts_or_order(monkeypatch):
    """It is the root of the exact sum of squares, up to one rounding, whatever is where."""
    generator = torch.Generator().manual_seed(5)
    exponents = torch.randint(-20, 4, (5000,), generator=generator)
    x = torch.randn(5000, generator=generator) * 2.0**exponents
    expected = math.sqrt(math.fsum(v * v for v in x.tolist()))
    whole = exact_norm([x])
    assert whole == pytest.approx(expected, rel=1e-15)
    shuffled = x[torch.randperm(5000, generator=generator)]
    monkeypatch.setattr(grad_norm, "_SLICE", 333)
    for parts in ([x], [x[:1], x[1:777], x[777:]], [shuffled.view(50, 100)], [x[:0], -x]):
        assert exact_norm(parts) == whole


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.0),
        ([0.0, -0.0], 0.0),
        ([3.0, -4.0], 5.0),
        ([3e-42, 4e-42], 5e-42),
        ([3e38, -3e38], 3e38 * math.sqrt(2)),
        ([1.0, math.inf, -1.0], math.inf),
        ([1.0, math.nan], math.nan),
    ],
)
def test_norms_at_the_ends_of_fp32(values, expected):
    """Where squares in fp32 would be 0 or infinite too."""
    found = exact_norm([torch.tensor(values, dtype=torch.float32)])
    assert found == pytest.approx(expected, rel=1e-3 if 0 < expected < 1e-40 else 1e-7, nan_ok=True)


def test_what_segments_do_not_go_with(make_trainer):
    """Each refusal names its key."""
    check_grad_segments(8, ParallelConfig(data=8))
    check_grad_segments(1, ParallelConfig(tensor=3, context=2))
    for segments, layout, message in (
        (-1, {}, "numerics.grad_segments is -1; it must be a power of two, or 0: off"),
        (6, {}, "numerics.grad_segments is 6; it must be a power of two, or 0: off"),
        (4, {"data": 8}, "trainer.parallel.data is 8; it must be a power of two up to numerics"),
        (4, {"data": 3}, "trainer.parallel.data is 3; it must be a power of two up to numerics"),
        (4, {"data": 2, "overlap_grad_reduce": True}, "overlap_grad_reduce is True; it must be f"),
        (0, {"offload_segment_sums": True}, "offload_segment_sums is True; it must be False, its"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_grad_segments(segments, ParallelConfig(**layout))
    with pytest.raises(ValueError, match="numerics.grad_segments is 3"):
        make_trainer(grad_segments=3)
