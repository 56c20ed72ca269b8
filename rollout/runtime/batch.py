"""Batch: what one forward step needs, made from the scheduled sequences."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from samebit.kernels.attention import plan_paged
from samebit.rollout.runtime.scheduler import Scheduled
from samebit.rollout.runtime.sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """Tensors of one step. Passed down as an argument; nothing global."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, absolute
    slots: torch.Tensor  # [T] int64, where each token's key and value go
    plan: Any
    row_starts: list[int]  # first row of each scheduled sequence


@dataclass(frozen=True)
class Rows:
    """Rows of the hidden states that predict a token, and for whom."""

    hidden_rows: torch.Tensor  # [S] int64
    seqs: list[Sequence]


def make_batch(
    step: Seq[Scheduled], page_size: int, heads_per_kv: int, device: torch.device
) -> Batch:
    """Lay the scheduled tokens one behind another."""
    num_tokens = [item.num_tokens for item in step]
    starts = [item.seq.num_computed for item in step]
    ends = [a + n for a, n in zip(starts, num_tokens, strict=True)]
    input_ids = np.concatenate(
        [item.seq.token_ids[a:b] for item, a, b in zip(step, starts, ends, strict=True)]
    )
    row_starts = np.cumsum([0, *num_tokens[:-1]])
    seq_of_row = np.repeat(np.arange(len(step)), num_tokens)
    positions = np.arange(len(input_ids)) - row_starts[seq_of_row] + np.array(starts)[seq_of_row]
    table = np.zeros((len(step), max(len(item.seq.pages) for item in step)), dtype=np.int64)
    for i, item in enumerate(step):
        table[i, : len(item.seq.pages)] = item.seq.pages
    slots = table[seq_of_row, positions // page_size] * page_size + positions % page_size
    return Batch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)).to(device),
        positions=torch.from_numpy(positions).to(device),
        slots=torch.from_numpy(slots).to(device),
        plan=plan_paged(num_tokens, ends, torch.from_numpy(table), page_size, heads_per_kv, device),
        row_starts=row_starts.tolist(),
    )


def sampling_rows(step: Seq[Scheduled], batch: Batch) -> Rows:
    """The last row of every sequence whose context is now complete, once per sample."""
    rows, seqs = [], []
    for item, start in zip(step, batch.row_starts, strict=True):
        if item.completes and not item.seq.request.score_only:
            samples = [item.seq, *item.seq.siblings]
            rows += [start + item.num_tokens - 1] * len(samples)
            seqs += samples
    return Rows(torch.tensor(rows, dtype=torch.int64), seqs)


def scoring_rows(step: Seq[Scheduled], batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """(rows, next tokens, owners) of score_only sequences: every row predicts a given token."""
    rows: list[int] = []
    next_ids: list[int] = []
    seqs: list[Sequence] = []
    for item, start in zip(step, batch.row_starts, strict=True):
        if item.seq.request.score_only:
            first = item.seq.num_computed + 1
            rows += range(start, start + item.num_tokens)
            next_ids += item.seq.token_ids[first : first + item.num_tokens]
            seqs += [item.seq] * item.num_tokens
    index = torch.tensor(rows, dtype=torch.int64)
    return index, torch.tensor(next_ids, dtype=torch.int64), Rows(index, seqs)
