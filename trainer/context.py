"""Context parallel: which rank computes which tokens of a packed batch. Nothing else knows.

Every sample is cut into 2 * size equal chunks; rank r takes chunk r and chunk 2 * size - 1 - r, so
that causal attention costs every rank about the same. Keys and values are gathered; queries stay
where they are and keep their absolute positions, so no bit depends on the size.
"""

from dataclasses import dataclass, replace

import torch

from samebit.kernels.attention_kind import AttentionKind, AttentionPlan
from samebit.kernels.reduce import RankGroup
from samebit.trainer.types import MicroBatch


@dataclass(frozen=True)
class ContextShare:
    """One rank's part of a micro-batch."""

    batch: MicroBatch
    """Its tokens and its loss rows only."""
    rows: torch.Tensor
    """[R of this rank] int64, which of the whole batch's loss rows they are."""
    order: torch.Tensor
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
    starts = [sum(batch.seq_lens[:i]) for i in range(len(batch.seq_lens))]
    chunks = [
        [
            (start, *chunk)
            for start, length in zip(starts, batch.seq_lens, strict=True)
            for chunk in chunks_of(length, rank, ranks.size)
            if chunk[0] < chunk[1]
        ]
        for rank in range(ranks.size)
    ]
    places = [[s + i for s, a, b in part for i in range(a, b)] for part in chunks]
    if not all(places):
        raise ValueError(
            f"micro-batch {batch.index} has {batch.num_tokens} tokens, too few for "
            f"trainer.parallel.context = {ranks.size}"
        )
    num_padded = max(map(len, places))
    order = torch.empty(batch.num_tokens, dtype=torch.int64)
    for rank, tokens in enumerate(places):
        order[tokens] = torch.arange(len(tokens)) + rank * num_padded
    mine, order = torch.tensor(places[ranks.rank], device=device), order.to(device)
    local = order - ranks.rank * num_padded  # meaningful for this rank's own tokens
    is_mine = torch.zeros(batch.num_tokens, dtype=torch.bool, device=device)
    is_mine[mine] = True
    rows = is_mine[batch.rows].nonzero().squeeze(1)
    by_token = batch.loss_denominator == len(batch.rows)
    compared = batch.rollout_logprobs
    share = replace(
        batch,
        input_ids=batch.input_ids[mine],
        positions=batch.positions[mine],
        rows=local[batch.rows[rows]],
        target_ids=batch.target_ids[rows],
        sample_of_row=batch.sample_of_row[rows],
        rollout_logprobs=None if compared is None else compared[rows],
        advantages=batch.advantages[rows],
        loss_weights=batch.loss_weights[rows],
        # The ranks' denominators add up to the batch's.
        loss_denominator=len(rows) if by_token else batch.loss_denominator * (ranks.rank == 0),
    )
    own = chunks[ranks.rank]
    plan = attention.plan_context(
        [b - a for _, a, b in own],
        [b for _, _, b in own],
        [start for start, _, _ in own],
        batch.num_tokens,
    )
    return ContextShare(share, rows, order, num_padded, plan, ranks)
