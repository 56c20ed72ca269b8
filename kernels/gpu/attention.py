"""attention on the GPU: KV tiles and splits at absolute positions, ordered merge, tensor cores.

Decode (decode_attention.py: few queries, a split per program) and prefill or training (here: splits
looped in registers, tiles of 64 or 128 rows) give the same bits.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from samebit.kernels.attention_kind import AttentionPlan, GraphEntries
from samebit.kernels.contract import GPU_KV_SPLIT, GPU_KV_TILE
from samebit.kernels.gpu.decode_attention import (
    LOG2E,
    DecodeEntries,
    decode_attention,
    decode_entries,
)
from samebit.kernels.gpu.hopper_attention import fits, prefill_attention
from samebit.kernels.gpu.online_softmax import merge, nothing_seen, num_stages, split_pass
from samebit.kernels.gpu.prefix_tasks import PrefixTasks, task_capacity
from samebit.kernels.shared_prefixes import SharedPrefixes
from samebit.kernels.transfer import to_device

_MOST_PARTS = 1 << 14  # of one query head: 272 MB of parts with 32 heads of 128

Share = Callable[[np.ndarray, np.ndarray, np.ndarray], SharedPrefixes | None]


def share_nothing(
    query_lens: np.ndarray, context_lens: np.ndarray, tables: np.ndarray
) -> SharedPrefixes | None:
    """Every entry reads its own context."""
    return None


@dataclass(frozen=True)
class GpuAttentionPlan(AttentionPlan):
    """Says what the kernels know of one batch: who has few new tokens decodes, others prefill."""

    query_starts: Tensor  # [B] int32: first row of each sequence among the T queries
    key_starts: Tensor  # [B] int32: first row of each sequence's keys, packed form only
    query_lens: Tensor  # [B] int32
    context_lens: Tensor  # [B] int32
    page_table: Tensor | None  # [B, max_pages] int32
    page_size: int
    decode: tuple[DecodeEntries, ...]
    tile_seq: Tensor  # int32, sequence of each query tile
    tile_start: Tensor  # int32, its first query in that sequence
    tile_rows: int
    longest: int  # bound of the contexts that prefill
    seq_lens: tuple[int, ...]  # packed form, on the host for the backward: queries,
    key_lens: tuple[int, ...] = ()  # their contexts,
    first_keys: tuple[int, ...] = ()  # and where those start
    own_keys: bool = True  # the keys are the queries' own, no more and in their order
    reads_ahead: bool = True  # see AttentionKind

    @functools.cached_property
    def boundaries(self) -> Tensor:
        """[B + 1] int32: the first query of each packed sequence, and the end."""
        return to_device(_boundaries(self.seq_lens), self.query_starts.device)

    @functools.cached_property
    def spread_keys(self) -> "SpreadKeys | None":
        """Where parts of sequences share keys or have more of them than queries."""
        if self.own_keys:
            return None
        return SpreadKeys.of(self.key_lens, self.first_keys, self.query_starts.device)


@dataclass(frozen=True)
class SpreadKeys:
    """Holds every part's keys one behind another, as if they were its own."""

    boundaries: Tensor
    """[B + 1] int32: the first key of each part, and the end."""
    rows: Tensor
    """int64: which of the packed keys each is."""
    rounds: tuple[Tensor, ...]
    """int64: the first parts of all sequences, then the second ones, and so on."""

    @classmethod
    def of(cls, lens: Sequence[int], starts: Sequence[int], device: torch.device) -> "SpreadKeys":
        """The keys of parts with lens[i] keys each, from starts[i] on."""
        boundaries = _boundaries(lens)
        rounds: list[list[Tensor]] = []
        seen: dict[int, int] = {}
        for i, start in enumerate(starts):
            number = seen[start] = seen.get(start, -1) + 1
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(torch.arange(int(boundaries[i]), int(boundaries[i + 1])))
        rows = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lens, strict=True)])
        of_round = tuple(to_device(torch.cat(parts), device) for parts in rounds)
        return cls(to_device(boundaries, device), to_device(rows, device), of_round)

    def summed(self, spread: Tensor, num_keys: int) -> Tensor:
        """Sum what was computed for each part's keys [sum, Hkv, Dh], for the packed ones.

        Returns [num_keys, Hkv, Dh], added up in fp32, part by part, and rounded once.
        """
        total = spread.new_zeros((num_keys, *spread.shape[1:]), dtype=torch.float32)
        for part in self.rounds:  # a key stands once in each
            total[self.rows[part]] += spread[part]
        return total.to(spread.dtype)


def _boundaries(lens: Sequence[int]) -> Tensor:
    return torch.tensor((0, *lens)).cumsum(0, dtype=torch.int32)


def plan(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_table: Tensor | None,
    page_size: int,
    device: torch.device,
    key_starts: Sequence[int] | None = None,
    num_keys: int = 0,
    most_queries: int = 0,
    share: Share = share_nothing,
) -> GpuAttentionPlan:
    """See plan_step and plan_context of AttentionKind; page_table None means packed keys.

    Samples with at most most_queries decode; share says what those are to read together.
    """
    queries, contexts = np.asarray(query_lens), np.asarray(context_lens)
    starts = np.concatenate([[0], np.cumsum(queries)[:-1]])
    first_keys = starts if key_starts is None else np.asarray(key_starts)
    own_keys = (queries == contexts).all() and (starts == first_keys).all()
    decoding = queries <= _few(queries, contexts, most_queries)
    prefilling = np.flatnonzero(~decoding)
    tile_rows = 128 if queries[prefilling].max(initial=0) > 64 else 64
    counts = -(-queries[prefilling] // tile_rows)
    tile_seq = np.repeat(prefilling, counts)
    tile_start = (
        np.arange(len(tile_seq)) - np.repeat(np.cumsum(counts) - counts, counts)
    ) * tile_rows
    # The tiles with the longest context first: they finish last otherwise.
    order = np.argsort(-(contexts[tile_seq] - queries[tile_seq] + tile_start), kind="stable")

    def placed(values: np.ndarray | Tensor) -> Tensor:
        return to_device(torch.as_tensor(values).to(torch.int32), device)

    decode: tuple[DecodeEntries, ...] = ()
    if page_table is not None:
        tables = page_table.numpy().astype(np.int32)
        decode = tuple(_plan_decode(queries, contexts, starts, tables, device, decoding, share))
    return GpuAttentionPlan(
        query_starts=placed(starts),
        key_starts=placed(first_keys),
        query_lens=placed(queries),
        context_lens=placed(contexts),
        page_table=None if page_table is None else placed(page_table),
        page_size=page_size,
        decode=decode,
        tile_seq=placed(tile_seq[order]),
        tile_start=placed(tile_start[order]),
        tile_rows=tile_rows,
        longest=int(contexts[prefilling].max(initial=0)),
        seq_lens=tuple(queries.tolist()),
        key_lens=tuple(contexts.tolist()),
        first_keys=tuple(first_keys.tolist()),
        own_keys=bool(own_keys) and int(queries.sum()) == num_keys,
    )


def _few(query_lens: np.ndarray, context_lens: np.ndarray, most_queries: int) -> int:
    """Up to how many queries decode: 1 where more would need too large parts of their splits."""
    several = (query_lens > 1) & (query_lens <= most_queries)
    if not several.any():
        return most_queries
    return few_queries(int(several.sum()), int(context_lens[several].max()), most_queries)


def few_queries(num_samples: int, max_context: int, most_queries: int) -> int:
    """Up to how many queries so many samples may have: most_queries, or 1 where parts get large."""
    num_parts = num_samples * most_queries * -(-max_context // GPU_KV_SPLIT)
    return most_queries if num_parts <= _MOST_PARTS else min(1, most_queries)


def _plan_decode(
    query_lens: np.ndarray,
    context_lens: np.ndarray,
    starts: np.ndarray,
    tables: np.ndarray,
    device: torch.device,
    decoding: np.ndarray,
    share: Share,
) -> Iterator[DecodeEntries]:
    """Yield those of the samples [B] that decode: with one query, then with several."""

    def placed(values: np.ndarray) -> Tensor:
        return to_device(values.astype(np.int32), device)

    for which in (query_lens == 1, query_lens > 1):
        rows = np.flatnonzero(which & decoding)
        if not len(rows):
            continue
        queries, contexts = query_lens[rows], context_lens[rows]
        shared = share(queries, contexts, tables[rows])
        yield decode_entries(
            query_starts=placed(starts[rows]),
            query_lens=placed(queries),
            table_rows=placed(rows),
            context_lens=placed(contexts),
            max_queries=int(queries.max()),
            max_context=int(contexts.max()),
            prefixes=None if shared is None else PrefixTasks.of(shared, device),
            max_own=None if shared is None else shared.longest_own(contexts),
        )


def plan_graph(entries: GraphEntries, heads_per_kv: int, max_own: int | None) -> GpuAttentionPlan:
    """A plan for decode steps alone, which finds its entries on the device; max_own: see there."""
    batch, device, queries = len(entries.table_rows), entries.table_rows.device, entries.max_queries
    rows = torch.arange(0, entries.num_rows, queries, dtype=torch.int32, device=device)
    none, prefixes = rows[:0], None
    if max_own is not None:
        capacity = task_capacity(heads_per_kv * queries)
        prefixes = PrefixTasks.for_graph(batch, capacity, entries.max_context, device)
    decode = decode_entries(
        query_starts=rows,
        query_lens=entries.query_lens,
        table_rows=entries.table_rows,
        context_lens=entries.context_lens,
        max_queries=queries,
        max_context=entries.max_context,
        prefixes=prefixes,
        max_own=max_own,
    )
    return GpuAttentionPlan(
        query_starts=none,
        key_starts=none,
        query_lens=none,
        context_lens=none,
        page_table=entries.page_table,
        page_size=entries.page_size,
        decode=(decode,),
        tile_seq=none,
        tile_start=none,
        tile_rows=64,
        longest=0,
        seq_lens=(),
    )


def prepare_replay(plan: AttentionPlan, shared: SharedPrefixes | None) -> None:
    """Tell a graph's kernels what its next replay's entries share."""
    assert isinstance(plan, GpuAttentionPlan)
    prefixes = plan.decode[0].prefixes
    if prefixes is not None and shared is not None:
        prefixes.write(shared)


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, query_starts, key_starts, query_lens, context_lens,
    pages_ptr, tile_seq, tile_start, max_pages, num_tokens, q_stride, q_head, stride, kv_head,
    qk_scale, HEADS, GROUP: tl.constexpr, DH: tl.constexpr, BLOCK_DH: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PAGED: tl.constexpr,
    PAGE: tl.constexpr, LSE: tl.constexpr, ONE_SPLIT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    seq = tl.load(tile_seq + tl.program_id(1))
    start = tl.load(tile_start + tl.program_id(1))
    query_len = tl.load(query_lens + seq)
    context_len = tl.load(context_lens + seq)
    local = start + tl.arange(0, ROWS)
    live = local < query_len
    position = context_len - query_len + local
    row = tl.load(query_starts + seq).to(tl.int64) + local
    d = tl.arange(0, BLOCK_DH)
    inside = live[:, None] & (d < DH)[None, :]
    q = tl.load(
        q_ptr + row[:, None] * q_stride + head * q_head + d[None, :], mask=inside, other=0.0
    )
    end = tl.minimum(context_len - query_len + start + ROWS, context_len)
    whole = context_len - query_len + start + 1
    k_head = k_ptr + (head // GROUP) * kv_head
    v_head = v_ptr + (head // GROUP) * kv_head
    pages = pages_ptr + seq.to(tl.int64) * max_pages
    key_start = tl.load(key_starts + seq)
    m, total, acc = nothing_seen(ROWS, BLOCK_DH)
    m, total, acc = split_pass(
        q=q, k_ptr=k_head, v_ptr=v_head, pages=pages, key_start=key_start, position=position,
        lo=0, whole=whole, hi=tl.minimum(SPLIT, end), stride=stride, qk_scale=qk_scale, m=m,
        total=total, acc=acc, DH=DH, BLOCK_DH=BLOCK_DH, TILE=TILE, SPLIT=SPLIT, PAGED=PAGED,
        PAGE=PAGE, UNMASKED=True, MASKED=True,
    )  # fmt: skip
    if not ONE_SPLIT:
        for s0 in range(SPLIT, end, SPLIT):
            next_m, next_total, next_acc = nothing_seen(ROWS, BLOCK_DH)
            next_m, next_total, next_acc = split_pass(
                q=q, k_ptr=k_head, v_ptr=v_head, pages=pages, key_start=key_start,
                position=position, lo=s0, whole=whole, hi=tl.minimum(s0 + SPLIT, end),
                stride=stride, qk_scale=qk_scale, m=next_m, total=next_total, acc=next_acc, DH=DH,
                BLOCK_DH=BLOCK_DH, TILE=TILE, SPLIT=SPLIT, PAGED=PAGED, PAGE=PAGE, UNMASKED=True,
                MASKED=True,
            )  # fmt: skip
            m, total, acc = merge(m, total, acc, next_m, next_total, next_acc)
    out = o_ptr + (row[:, None] * HEADS + head) * DH + d[None, :]
    tl.store(out, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=inside)
    if LSE:
        lse = (m + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + head.to(tl.int64) * num_tokens + row, lse, mask=live)


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: GpuAttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q [T, Hq, Dh] to k and v [kv_slots, Hkv, Dh], in bf16.

    Returns the output [T, Hq, Dh] and, of packed keys, the log-sum-exps [Hq, T] fp32.
    """
    if q.dtype != torch.bfloat16:
        raise ValueError(f"attention on the GPU takes torch.bfloat16, got {q.dtype}")
    table = plan.page_table
    usable = k.stride() == v.stride() and k.stride(-1) == 1
    if table is not None and not usable:  # a copy would be written by the kernel directly before
        raise ValueError(
            f"caches of keys and values have the strides {k.stride()} and {v.stride()}; give equal "
            "ones, the last of them 1"
        )
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    num_tokens, num_heads, head_dim = q.shape
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_heads, num_tokens if table is None else 0, device=q.device)
    for entries in plan.decode:
        assert table is not None
        decode_attention(
            q, k, v, output, entries, table, plan.page_size, scale, plan.reads_ahead
        )  # fmt: skip
    if len(plan.tile_seq) and fits(k, v, plan.tile_rows, None if table is None else plan.page_size):
        prefill_attention(q, k, v, output, lse, plan, scale * LOG2E)
    elif len(plan.tile_seq):
        block_dh = triton.next_power_of_2(head_dim)
        _prefill_kernel[(num_heads, len(plan.tile_seq))](
            q_ptr=q, k_ptr=k, v_ptr=v, o_ptr=output, lse_ptr=lse, query_starts=plan.query_starts,
            key_starts=plan.key_starts, query_lens=plan.query_lens, context_lens=plan.context_lens,
            pages_ptr=q if table is None else table, tile_seq=plan.tile_seq,
            tile_start=plan.tile_start, max_pages=0 if table is None else table.stride(0),
            num_tokens=num_tokens, q_stride=q.stride(0), q_head=q.stride(1), stride=k.stride(0),
            kv_head=k.stride(1), qk_scale=scale * LOG2E, HEADS=num_heads,
            GROUP=num_heads // k.shape[1], DH=head_dim,
            BLOCK_DH=block_dh, ROWS=plan.tile_rows, TILE=GPU_KV_TILE,
            SPLIT=GPU_KV_SPLIT, PAGED=table is not None, PAGE=plan.page_size, LSE=lse.shape[1] > 0,
            ONE_SPLIT=plan.longest <= GPU_KV_SPLIT, num_warps=8 if plan.tile_rows == 128 else 4,
            num_stages=num_stages(plan.tile_rows, block_dh, q.device, 2), enable_fp_fusion=False,
        )  # fmt: skip
    return output, lse
