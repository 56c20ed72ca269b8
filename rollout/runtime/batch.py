"""Batch: the tensors of one forward, made from a scheduled EngineStep."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.attention_kind import AttentionKind, AttentionPlan
from samebit.kernels.sample import signed64
from samebit.kernels.transfer import to_device
from samebit.rollout.runtime.drafts import Drafts
from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.runtime.scheduler import Chunk, EngineStep
from samebit.rollout.runtime.slots import Slots


@dataclass(frozen=True)
class Batch:
    """Holds what a forward needs. It is passed down as an argument; nothing is global."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, absolute
    kv_slots: Tensor  # [T] int64, where each token's key and value go in the cache
    plan: AttentionPlan


@dataclass(frozen=True)
class Draws:
    """Rows that predict a token to be drawn, and all that its draw depends on; [S] each."""

    hidden_rows: np.ndarray  # int64, rows of the batch
    positions: np.ndarray  # int64, of the token to be drawn
    seeds: np.ndarray  # int64
    sample_ids: np.ndarray  # int64
    temperatures: np.ndarray  # float32, 1 where greedy
    greedy: np.ndarray  # bool
    out_slots: np.ndarray  # int64, of the drawing sample; num_slots: it has none
    restricted: list[tuple[int, RunningSample]]  # rows where not every token may be drawn


def keep_tokens(last_tokens: Tensor, token_ids: Tensor, draws: Draws) -> None:
    """Note the newest token of each drawing slot in last_tokens, for the next step's forward."""
    last_tokens.index_copy_(0, to_device(draws.out_slots, last_tokens.device), token_ids)


def chunk_rows(step: EngineStep) -> Iterable[tuple[Chunk, slice]]:
    """Each chunk with its rows of the batch; the decoding samples come before them."""
    row = step.num_decode_rows
    for chunk in step.chunks:
        yield chunk, slice(row, row + chunk.num_tokens)
        row += chunk.num_tokens


@dataclass(frozen=True)
class Layout:
    """Where the new tokens of B samples lie: the T rows of a forward."""

    starts: np.ndarray  # [B] int64, position of each sample's first row
    lens: np.ndarray  # [B] int64, rows of each
    positions: np.ndarray  # [T] int64
    kv_slots: np.ndarray  # [T] int64
    table: np.ndarray  # [B, pages] int64


def lay_out(owners: np.ndarray, starts: np.ndarray, lens: np.ndarray, slots: Slots) -> Layout:
    """Rows for the tokens [start, start + len) of the samples in the slots `owners`; all [B]."""
    page_size, owner_of_row = slots.page_size, np.repeat(np.arange(len(owners)), lens)
    row_starts = np.cumsum(lens) - lens
    positions = np.arange(len(owner_of_row)) - row_starts[owner_of_row] + starts[owner_of_row]
    num_pages = -(-int((starts + lens).max()) // page_size)
    table = slots.pages[owners, :num_pages].astype(np.int64)
    kv_slots = table[owner_of_row, positions // page_size] * page_size + positions % page_size
    return Layout(starts, lens, positions, kv_slots, table)


def make_batch(
    step: EngineStep, slots: Slots, last_tokens: Tensor, attention: AttentionKind
) -> Batch:
    """Lay the step's tokens one behind another, and plan attention.

    last_tokens [num_slots + 1] on the device: the newest token of each slot, which the host may
    not know yet.
    """
    device, num_decode = last_tokens.device, len(step.decode)
    chunk_slots = [chunk.seq.slot for chunk in step.chunks]
    owners = np.concatenate([step.decode, np.array(chunk_slots, dtype=np.int64)])
    starts = np.concatenate(
        [slots.computed[step.decode], np.array([c.start for c in step.chunks], dtype=np.int64)]
    )
    lens, drafts = np.ones(len(owners), dtype=np.int64), step.drafts
    lens[num_decode:] = [c.num_tokens for c in step.chunks]
    if drafts is not None:
        lens[:num_decode] += drafts.lens
    layout = lay_out(owners, starts, lens, slots)
    given = [c.seq.token_ids[c.start : c.end] for c in step.chunks]
    newest = slots.newest(step.decode)
    token_ids = newest if drafts is None else drafts.behind(newest)
    chunk_ids = np.array([t for ids in given for t in ids], dtype=np.int64)
    input_ids = to_device(np.concatenate([token_ids, chunk_ids]), device)
    if len(unknown := np.flatnonzero(newest < 0)):
        rows = to_device(unknown if drafts is None else drafts.firsts[unknown], device)
        input_ids[rows] = last_tokens[to_device(step.decode[unknown], device)]
    plan = attention.plan_step(
        lens.tolist(), (starts + lens).tolist(), torch.from_numpy(layout.table), slots.page_size
    )
    return Batch(
        input_ids=input_ids,
        positions=to_device(layout.positions, device),
        kv_slots=to_device(layout.kv_slots, device),
        plan=plan,
    )


def decode_draws(decode: np.ndarray, slots: Slots, drafts: Drafts | None = None) -> Draws:
    """Every decoding sample draws its next token, and one behind each guess.

    Which of them is its newest is then known once they have arrived: no slot takes one here.
    """
    positions, out_slots = slots.length[decode], decode
    if drafts is not None:
        decode = drafts.spread(decode)
        positions = slots.length[decode] + drafts.offsets
        out_slots = np.full(len(decode), slots.num_slots)
    restricted = slots.limited[decode] | (positions < slots.min_length[decode])
    owners = [(int(i), slots.seqs[decode[i]]) for i in np.flatnonzero(restricted)]
    return Draws(
        hidden_rows=np.arange(len(decode)),
        positions=positions,
        seeds=slots.seed[decode],
        sample_ids=slots.sample_id[decode],
        temperatures=slots.temperature[decode],
        greedy=slots.greedy[decode],
        out_slots=out_slots,
        restricted=[(i, seq) for i, seq in owners if seq is not None],
    )


def make_draws(step: EngineStep, slots: Slots) -> Draws:
    """The decoding samples, then those whose context a chunk completes."""
    decode = decode_draws(step.decode, slots, step.drafts)
    rows = [
        (seq, part.stop - 1, chunk.end) for chunk, part in chunk_rows(step) for seq in chunk.drawing
    ]
    if not rows:
        return decode
    seqs, hidden_rows, positions = zip(*rows, strict=True)
    params = [seq.request.params for seq in seqs]
    num_decode = step.num_decode_rows

    def joined(first: np.ndarray, values: Iterable[Any]) -> np.ndarray:
        return np.concatenate([first, np.array(list(values), dtype=first.dtype)])

    return Draws(
        hidden_rows=joined(decode.hidden_rows, hidden_rows),
        positions=joined(decode.positions, positions),
        seeds=joined(decode.seeds, (slots.seed_of(seq) for seq in seqs)),
        sample_ids=joined(decode.sample_ids, (signed64(seq.sample_id) for seq in seqs)),
        temperatures=joined(decode.temperatures, (p.temperature or 1.0 for p in params)),
        greedy=joined(decode.greedy, (p.temperature == 0 for p in params)),
        out_slots=joined(
            decode.out_slots, (slots.num_slots if s.slot is None else s.slot for s in seqs)
        ),
        restricted=decode.restricted
        + [
            (num_decode + i, seq)
            for i, seq in enumerate(seqs)
            if params[i].limits or positions[i] < slots.min_length_of(seq)
        ],
    )


def scoring_rows(step: EngineStep) -> tuple[np.ndarray, np.ndarray, list[RunningSample]]:
    """(rows, next tokens, owners) of score_only samples: every row predicts a given token."""
    rows: list[int] = []
    next_ids: list[int] = []
    owners: list[RunningSample] = []
    for chunk, part in chunk_rows(step):
        if chunk.scores:
            rows += range(part.start, part.stop)
            next_ids += chunk.seq.token_ids[chunk.start + 1 : chunk.end + 1]
            owners += [chunk.seq] * chunk.num_tokens
    return np.array(rows, dtype=np.int64), np.array(next_ids, dtype=np.int64), owners
