"""Who computes which tokens of a packed batch under context parallelism."""

from dataclasses import replace

import pytest
import torch

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import Heads
from samebit.kernels.reduce import RankGroup
from samebit.trainer.context import chunks_of, share_context
from samebit.trainer.packing import pack_samples

ATTENTION = CanonicalAttention(Heads(4, 2, 16, 0.25), torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 100, 101])
def test_chunks_cut_a_sample_once_and_evenly(size, length):
    """Every token belongs to one rank, and causal attention costs all about the same."""
    owned = [
        [p for a, b in chunks_of(length, rank, size) for p in range(a, b)] for rank in range(size)
    ]
    assert sorted(p for own in owned for p in own) == list(range(length))
    if length >= 100:
        work = [sum(p + 1 for p in own) for own in owned]
        assert max(work) < 1.1 * min(work)


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize("size", [2, 3])
def test_shares_hold_every_token_and_loss_row_once(random_samples, size, loss_mean):
    [batch] = pack_samples(random_samples(7, seed=3, with_logprobs=True), 1000, loss_mean)
    batch = replace(batch, is_compared=batch.sample_of_row % 2 == 1)
    group = object()  # stands for the group; nothing is sent
    shares = [share_context(batch, RankGroup(r, size, group), ATTENTION) for r in range(size)]
    padded = torch.full((size * shares[0].num_padded,), -1)
    for rank, share in enumerate(shares):
        start = rank * share.num_padded
        padded[start : start + share.batch.num_tokens] = share.batch.input_ids
        assert torch.equal(share.order, shares[0].order)
        own = share.batch
        assert torch.equal(own.target_ids, batch.target_ids[share.rows])
        assert torch.equal(own.rollout_logprobs, batch.rollout_logprobs[share.rows])
        assert torch.equal(own.advantages, batch.advantages[share.rows])
        assert torch.equal(own.is_compared, batch.is_compared[share.rows])
        assert torch.equal(own.row_counts, batch.row_counts)
        assert torch.equal(own.loss_weights, batch.loss_weights[share.rows])
        assert torch.equal(own.sample_of_row, batch.sample_of_row[share.rows])
        assert torch.equal(own.positions[own.rows], batch.positions[batch.rows[share.rows]])
        assert torch.equal(own.input_ids[own.rows], batch.input_ids[batch.rows[share.rows]])
    assert torch.equal(padded[shares[0].order], batch.input_ids)
    rows = torch.cat([share.rows for share in shares])
    assert torch.equal(rows.sort().values, torch.arange(len(batch.rows)))
    assert sum(s.batch.loss_denominator for s in shares) == batch.loss_denominator


def test_a_batch_too_short_for_all_ranks_is_refused(random_samples):
    [batch] = pack_samples(random_samples(1, seed=3), 1000)
    with pytest.raises(ValueError, match=r"micro-batch 0 has \d+ tokens, too few for .*context"):
        share_context(batch, RankGroup(0, 1000, object()), ATTENTION)
