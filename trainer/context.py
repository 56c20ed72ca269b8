"""Context parallel: which rank computes which tokens of a packed batch, and sums over all of them.

Every sample is cut into 2 * size equal chunks; rank r takes chunk r and chunk 2 * size - 1 - r, so
that causal attention costs every rank about the same. Keys and values are gathered; queries keep
their absolute positions, so no bit depends on the size.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.attention_kind import AttentionKind, AttentionPlan
from samebit.kernels.reduce import ALONE, RankGroup, gather_rows
from samebit.trainer.types import MicroBatch


@dataclass(frozen=True)
class ContextShare:
    """One rank's part of a micro-batch."""

    batch: MicroBatch
    """Its tokens and its loss rows only."""
    rows: Tensor
    """[R of this rank] int64, which of the whole batch's loss rows they are."""
    order: Tensor
    """[T] int64, where each token of the whole batch stands among the ranks' padded rows."""
    num_padded: int
    """Rows that each rank contributes to a gather."""
    plan: AttentionPlan
    """Attention of this rank's queries to all keys."""
    ranks: RankGroup


def chunks_of(length: int, rank: int, size: int) -> list[tuple[int, int]]:
    """(start, end) of this rank's two chunks of a sample."""
    cuts = [length * i // (2 * size) for i in range(2 * size + 1)]
    return [(cuts[i], cuts[i + 1]) for i in (rank, 2 * size - 1 - rank)]


def share_context(batch: MicroBatch, ranks: RankGroup, attention: AttentionKind) -> ContextShare:
    """This rank's share. Raises ValueError if the batch is too short to give every rank a token."""
    device = batch.input_ids.device
    starts = [0, *accumulate(batch.seq_lens[:-1])]
    chunks = [
        [
            (start, *chunk)
            for start, length in zip(starts, batch.seq_lens, strict=True)
            for chunk in chunks_of(length, rank, ranks.size)
            if chunk[0] < chunk[1]
        ]
        for rank in range(ranks.size)
    ]
    none = np.empty(0, np.int64)
    places = [np.concatenate([none, *(np.arange(s + a, s + b) for s, a, b in c)]) for c in chunks]
    num_padded, fewest = max(map(len, places)), min(map(len, places))
    if not fewest:
        raise ValueError(
            f"micro-batch {batch.index} has {batch.num_tokens} tokens, too few for "
            f"parallel.context = {ranks.size}"
        )
    ordered = np.empty(batch.num_tokens, np.int64)
    for rank, tokens in enumerate(places):
        ordered[tokens] = np.arange(len(tokens)) + rank * num_padded
    mine, order = (torch.from_numpy(x).to(device) for x in (places[ranks.rank], ordered))
    local = order - ranks.rank * num_padded  # meaningful for this rank's own tokens
    is_mine = torch.zeros(batch.num_tokens, dtype=torch.bool, device=device)
    is_mine[mine] = True
    rows = is_mine[batch.rows].nonzero().squeeze(1)
    drawn = batch.rollout_logprobs
    share = replace(
        batch,
        input_ids=batch.input_ids[mine],
        positions=batch.positions[mine],
        rows=local[batch.rows[rows]],
        target_ids=batch.target_ids[rows],
        sample_of_row=batch.sample_of_row[rows],
        rollout_logprobs=None if drawn is None else drawn[rows],
        is_compared=batch.is_compared[rows],
        advantages=batch.advantages[rows],
        loss_weights=batch.loss_weights[rows],
        kept=None if batch.kept is None else batch.kept.select(rows),
        teacher_top=None if batch.teacher_top is None else batch.teacher_top.select(rows),
        # The ranks' denominators add up to the batch's.
        loss_denominator=batch.loss_denominator * (ranks.rank == 0),
    )
    own = chunks[ranks.rank]
    plan = attention.plan_context(
        [b - a for _, a, b in own],
        [b for _, _, b in own],
        [start for start, _, _ in own],
        batch.num_tokens,
    )
    return ContextShare(share, rows, order, num_padded, plan, ranks)


def _own_sums(rows: Tensor, batch: MicroBatch) -> Tensor:
    """Sums of this rank's rows [R] by sample [B], in fp64 and in one order, on a GPU too."""
    sample, device = batch.sample_of_row, rows.device
    # Rows of a sample are neighbours: each sample has a line of a table, filled up with zeros.
    first = torch.searchsorted(sample, torch.arange(len(batch.samples), device=device))
    place = torch.arange(len(sample), device=device) - first[sample]
    table = rows.new_zeros(len(batch.samples), max(batch.seq_lens), dtype=torch.float64)
    table[sample, place] = rows.double()
    return table.sum(1)


def _sums_over(ranks: RankGroup, own: Tensor) -> Tensor:
    """Sums of every rank's values [B] fp64, in rank order."""
    if ranks.size == 1:
        return own
    total, *others = gather_rows(own[None], ranks)
    for part in others:
        total = total + part
    return total


class _SampleSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, batch: MicroBatch, ranks: RankGroup) -> Tensor:
        ctx.batch, ctx.ranks = batch, ranks
        return _sums_over(ranks, _own_sums(rows, batch)).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = _sums_over(ctx.ranks, grad.double())  # every rank has used the sum
        return total.to(grad.dtype)[ctx.batch.sample_of_row], None, None


class _InRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, samples: Tensor, batch: MicroBatch) -> Tensor:
        ctx.batch = batch
        return samples[batch.sample_of_row]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _own_sums(grad, ctx.batch).to(grad.dtype), None


def sample_sums(rows: Tensor, batch: MicroBatch, ranks: RankGroup = ALONE) -> Tensor:
    """Sums of values of loss rows [R] by sample [B], rounded once; they are differentiable.

    With `ranks`, the context ranks that share a micro-batch, `batch` is a rank's share and every
    rank gets the sums over all shares. Each of them must call this as often, with rows or without.
    """
    return _SampleSums.apply(rows, batch, ranks)


def in_rows(samples: Tensor, batch: MicroBatch) -> Tensor:
    """Values of samples [B] in each of their loss rows [R]; they are differentiable."""
    return _InRows.apply(samples, batch)
