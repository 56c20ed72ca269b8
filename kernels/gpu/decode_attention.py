"""attention of decode entries on the GPU: a program for each split, the last one merges.

An entry has up to 16 query rows at successive positions. Its last program to arrive merges
the splits' (max, sum, accumulator) in ascending order, so the result does not depend on who that
is. Tiles that entries share are read once for all of them, by a kernel before; each entry's own
programs carry its (max, sum, accumulator) on or merge it: the same operations in the same order.
Hopper has kernels of its own for both, the second for most batches: hopper_prefix.py,
hopper_decode.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from samebit.kernels.contract import GPU_KV_SPLIT, GPU_KV_TILE
from samebit.kernels.gpu.card import num_sms
from samebit.kernels.gpu.hopper_decode import fits, own_attention
from samebit.kernels.gpu.hopper_prefix import prefix_attention
from samebit.kernels.gpu.hopper_tiles import takes
from samebit.kernels.gpu.online_softmax import merge, nothing_seen, num_stages, split_pass
from samebit.kernels.gpu.pdl import after_previous, prefetch_l2, supported
from samebit.kernels.gpu.prefix_tasks import PrefixTasks, task_rows

LOG2E = 1.4426950408889634
_LEAST_ROWS, _MOST_ROWS = 16, 128
_MAX_KV_HEADS = 128
_WAVES = 2  # programs over shared tiles, of which a multiprocessor holds one at a time


def most_queries(heads_per_kv: int) -> int:
    """Queries that an entry may have, for so many query heads of a KV head: a power of two."""
    most = max(1, min(16, _MOST_ROWS // heads_per_kv))
    return 1 << (most.bit_length() - 1)


@dataclass(frozen=True)
class DecodeEntries:
    """Samples with few query rows; a context of 0 marks what only fills a batch up."""

    query_starts: Tensor  # [E] int32, first row among the T queries
    query_lens: Tensor  # [E] int32, 1 to max_queries
    table_rows: Tensor  # [E] int32, rows of the page table
    context_lens: Tensor  # [E] int32, the new tokens included
    max_queries: int  # a power of two
    max_context: int  # bound of context_lens
    max_own: int  # bound of what an entry reads for itself, from a split's start on
    counters: Tensor  # [E * _MAX_KV_HEADS] int32, zeros between kernels: arrived splits
    prefixes: PrefixTasks | None  # None: no entry shares anything


def decode_entries(
    query_starts: Tensor,
    query_lens: Tensor,
    table_rows: Tensor,
    context_lens: Tensor,
    max_queries: int,
    max_context: int,
    prefixes: PrefixTasks | None = None,
    max_own: int | None = None,
) -> DecodeEntries:
    """Entries whose tensors are these [E] int32, with counters of their own.

    max_own: with prefixes, a bound of SharedPrefixes.longest_own.
    """
    counters = table_rows.new_zeros(len(table_rows) * _MAX_KV_HEADS)
    return DecodeEntries(
        query_starts=query_starts,
        query_lens=query_lens,
        table_rows=table_rows,
        context_lens=context_lens,
        max_queries=triton.next_power_of_2(max_queries),
        max_context=max_context,
        max_own=max_context if max_own is None else max_own,
        counters=counters,
        prefixes=prefixes,
    )


@triton.jit
def _prefetch_tile(k_head, v_head, pages, lo, end, stride, TILE: tl.constexpr, PAGE: tl.constexpr,
                   BLOCK_DH: tl.constexpr):  # fmt: skip
    """Ask for the keys [lo, lo + TILE) below `end` and their values to come to the L2 cache."""
    n = lo + tl.arange(0, TILE)
    page = tl.load(pages + n // PAGE, mask=n < end, other=0).to(tl.int64)
    lines = ((page * PAGE + n % PAGE) * stride)[:, None] + (tl.arange(0, BLOCK_DH // 64) * 64)
    prefetch_l2(k_head + lines)
    prefetch_l2(v_head + lines)


@triton.jit
def _load_part(max_ptr, sum_ptr, acc_ptr, place, mask, BLOCK_DH: tl.constexpr):
    """(max, sum, accumulator) as another program wrote it; nothing seen where the mask is off."""
    d = tl.arange(0, BLOCK_DH)
    m = tl.load(max_ptr + place, mask=mask, other=-1e30, cache_modifier=".cg")
    total = tl.load(sum_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
    acc = tl.load(
        acc_ptr + place[:, None] * BLOCK_DH + d[None, :], mask=mask[:, None], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip
    return m, total, acc


@triton.jit
def _store_part(max_ptr, sum_ptr, acc_ptr, place, mask, m, total, acc, BLOCK_DH: tl.constexpr):
    """Write (max, sum, accumulator) for another program."""
    tl.store(max_ptr + place, m, mask=mask)
    tl.store(sum_ptr + place, total, mask=mask)
    tl.store(
        acc_ptr + place[:, None] * BLOCK_DH + tl.arange(0, BLOCK_DH)[None, :],
        acc,
        mask=mask[:, None],
    )


@triton.jit(do_not_specialize=["max_pages", "max_splits"])
def _prefix_kernel(
    q_ptr, k_ptr, v_ptr, max_ptr, sum_ptr, acc_ptr, members, lens, num_items, items, query_starts,
    query_lens, table_rows, pages_ptr, max_pages, q_stride, q_head, stride, kv_head, qk_scale,
    max_splits, NUM_KV: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    CAPACITY: tl.constexpr, DH: tl.constexpr, BLOCK_DH: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Splits of what tasks' members share, for one KV head: every query sees all of it."""
    kv = tl.program_id(0)
    k_head, v_head = k_ptr + kv * kv_head, v_ptr + kv * kv_head
    r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_DH)
    OWN: tl.constexpr = GROUP * QUERIES  # rows of an entry
    heads, count = kv * GROUP + r % GROUP, tl.load(num_items)
    if PDL and tl.program_id(1) < count:  # the first tile, while the preceding kernel still runs
        task = tl.load(items + 2 * tl.program_id(1))
        first = tl.load(table_rows + tl.load(members + task * CAPACITY)).to(tl.int64)
        lo = tl.load(items + 2 * tl.program_id(1) + 1) * SPLIT
        pages, end = pages_ptr + first * max_pages, tl.load(lens + task)
        _prefetch_tile(k_head, v_head, pages, lo, end, stride, TILE, PAGE, BLOCK_DH)
    after_previous(PDL)
    for item in range(tl.program_id(1), count, tl.num_programs(1)):
        task, split = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
        whose = task * CAPACITY + r // OWN
        entry = tl.load(members + whose, mask=r // OWN < CAPACITY, other=-1)
        live = entry >= 0
        entry = tl.maximum(entry, 0)
        query = r % OWN // GROUP
        live = live & (query < tl.load(query_lens + entry))
        row = tl.load(query_starts + entry).to(tl.int64) + query
        q = tl.load(
            q_ptr + (row * q_stride + heads * q_head)[:, None] + d[None, :],
            mask=live[:, None] & (d < DH)[None, :], other=0.0,
        )  # fmt: skip
        first = tl.load(members + task * CAPACITY)
        pages = pages_ptr + tl.load(table_rows + first).to(tl.int64) * max_pages
        lo = split * SPLIT
        hi = tl.minimum(lo + SPLIT, tl.load(lens + task))
        m, total, acc = nothing_seen(ROWS, BLOCK_DH)
        m, total, acc = split_pass(
            q=q, k_ptr=k_head, v_ptr=v_head, pages=pages, key_start=0, position=r, lo=lo, whole=hi,
            hi=hi, stride=stride, qk_scale=qk_scale, m=m, total=total, acc=acc, DH=DH,
            BLOCK_DH=BLOCK_DH, TILE=TILE, SPLIT=SPLIT, PAGED=True, PAGE=PAGE, UNMASKED=True,
            MASKED=False,
        )  # fmt: skip
        place = ((entry.to(tl.int64) * NUM_KV + kv) * max_splits + split) * OWN + r % OWN
        _store_part(max_ptr, sum_ptr, acc_ptr, place, live, m, total, acc, BLOCK_DH)


@triton.jit
def _merge_parts(
    max_ptr, sum_ptr, acc_ptr, first, num_splits, mask, OWN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_DH: tl.constexpr,
):  # fmt: skip
    """The (max, sum, accumulator) of an entry's splits in ascending order; first: of split 0.

    Few rows: four parts are on their way at a time, since long contexts would wait for each.
    """
    m, total, acc = nothing_seen(ROWS, BLOCK_DH)
    if ROWS < 64:
        for s0 in range(0, num_splits, 4):
            one, two, three = s0 + 1 < num_splits, s0 + 2 < num_splits, s0 + 3 < num_splits
            place = first + s0 * OWN
            m0, t0, a0 = _load_part(max_ptr, sum_ptr, acc_ptr, place, mask, BLOCK_DH)
            place += OWN
            m1, t1, a1 = _load_part(max_ptr, sum_ptr, acc_ptr, place, mask & one, BLOCK_DH)
            place += OWN
            m2, t2, a2 = _load_part(max_ptr, sum_ptr, acc_ptr, place, mask & two, BLOCK_DH)
            place += OWN
            m3, t3, a3 = _load_part(max_ptr, sum_ptr, acc_ptr, place, mask & three, BLOCK_DH)
            m, total, acc = merge(m, total, acc, m0, t0, a0)
            if one:
                m, total, acc = merge(m, total, acc, m1, t1, a1)
            if two:
                m, total, acc = merge(m, total, acc, m2, t2, a2)
            if three:
                m, total, acc = merge(m, total, acc, m3, t3, a3)
    else:
        for split in range(0, num_splits):
            place = first + split * OWN
            part_m, part, part_acc = _load_part(max_ptr, sum_ptr, acc_ptr, place, mask, BLOCK_DH)
            m, total, acc = merge(m, total, acc, part_m, part, part_acc)
    return m, total, acc


@triton.jit(do_not_specialize=["max_pages", "max_splits"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, max_ptr, sum_ptr, acc_ptr, counters, prefix_lens, query_starts,
    query_lens, table_rows, context_lens, pages_ptr, max_pages, q_stride, q_head, stride, kv_head,
    qk_scale, max_splits, NUM_KV: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    DH: tl.constexpr, BLOCK_DH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One of the splits that an entry reads itself, of a KV head; the last to arrive merges all."""
    kv, entry, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens + entry)
    row = tl.load(query_starts + entry).to(tl.int64)
    query_len = tl.load(query_lens + entry) if QUERIES > 1 else 1
    shared = tl.load(prefix_lens + entry) if SHARED else 0
    split += shared // SPLIT
    pages = pages_ptr + tl.load(table_rows + entry).to(tl.int64) * max_pages
    k_head, v_head = k_ptr + kv * kv_head, v_ptr + kv * kv_head
    lo = tl.maximum(split * SPLIT, shared)
    hi = tl.minimum((split + 1) * SPLIT, context_len)
    if PDL and lo < hi:  # the first tile, while the preceding kernel still runs
        _prefetch_tile(k_head, v_head, pages, lo, hi, stride, TILE, PAGE, BLOCK_DH)
    after_previous(PDL)
    if lo >= hi:
        return
    r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_DH)
    OWN: tl.constexpr = GROUP * QUERIES
    query = r // GROUP
    live = (r < OWN) & (query < query_len)
    inside = live[:, None] & (d < DH)[None, :]
    heads = (kv * GROUP + r % GROUP)[:, None]
    q = tl.load(
        q_ptr + (row + query)[:, None] * q_stride + heads * q_head + d[None, :], mask=inside,
        other=0.0,
    )  # fmt: skip
    whose = entry.to(tl.int64) * NUM_KV + kv
    place = (whose * max_splits + split) * OWN + r
    m, total, acc = nothing_seen(ROWS, BLOCK_DH)
    if SHARED:
        carried = live & (split * SPLIT < shared)
        m, total, acc = _load_part(max_ptr, sum_ptr, acc_ptr, place, carried, BLOCK_DH)
    m, total, acc = split_pass(
        q=q, k_ptr=k_head, v_ptr=v_head, pages=pages, key_start=0,
        position=context_len - query_len + query, lo=lo, whole=hi, hi=hi, stride=stride,
        qk_scale=qk_scale, m=m, total=total, acc=acc, DH=DH, BLOCK_DH=BLOCK_DH, TILE=TILE,
        SPLIT=SPLIT, PAGED=True, PAGE=PAGE, UNMASKED=False, MASKED=True,
    )  # fmt: skip
    num_splits = tl.cdiv(context_len, SPLIT)
    out = o_ptr + ((row + query)[:, None] * NUM_KV * GROUP + heads) * DH + d[None, :]
    if num_splits == 1:
        tl.store(out, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=inside)
        return
    _store_part(max_ptr, sum_ptr, acc_ptr, place, live, m, total, acc, BLOCK_DH)
    tl.debug_barrier()  # every thread's part is written before the arrival is counted
    arrived = tl.atomic_add(counters + whose, 1, sem="acq_rel")
    if arrived != num_splits - 1 - shared // SPLIT:
        return
    m, total, acc = _merge_parts(
        max_ptr, sum_ptr, acc_ptr, place - split * OWN, num_splits, live, OWN, ROWS, BLOCK_DH
    )
    tl.store(out, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(counters + whose, 0)


def _prefix_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    decode: DecodeEntries,
    table: Tensor,
    page_size: int,
    scale: float,
    reads_ahead: bool,
) -> None:
    """Compute what entries share: each one's (max, sum, accumulator) of its splits.

    parts: [entries, Hkv, splits, rows of an entry], the last one with the block of Dh beside.
    """
    prefixes, num_heads, (num_kv, head_dim) = decode.prefixes, q.shape[1], k.shape[1:]
    assert prefixes is not None
    rows = task_rows(num_heads // num_kv * decode.max_queries)
    max_splits = triton.cdiv(decode.max_context, GPU_KV_SPLIT)
    if takes(k, v, page_size):
        return prefix_attention(
            q, k, v, parts, decode, table, page_size, scale * LOG2E, rows, max_splits, reads_ahead
        )  # fmt: skip
    programs = min(prefixes.most_items, triton.cdiv(_WAVES * num_sms(q.device), num_kv))
    (part_max, part_sum, part_acc), pdl = parts, supported(q.device)
    block_dh = part_acc.shape[1]
    _prefix_kernel[(num_kv, programs)](
        q_ptr=q, k_ptr=k, v_ptr=v, max_ptr=part_max, sum_ptr=part_sum, acc_ptr=part_acc,
        members=prefixes.members, lens=prefixes.lens, num_items=prefixes.num_items,
        items=prefixes.items, query_starts=decode.query_starts, query_lens=decode.query_lens,
        table_rows=decode.table_rows, pages_ptr=table, max_pages=table.stride(0),
        q_stride=q.stride(0), q_head=q.stride(1), stride=k.stride(0), kv_head=k.stride(1),
        qk_scale=scale * LOG2E, max_splits=max_splits, NUM_KV=num_kv, GROUP=num_heads // num_kv,
        QUERIES=decode.max_queries, CAPACITY=prefixes.members.shape[1], DH=head_dim,
        BLOCK_DH=block_dh, ROWS=rows, TILE=GPU_KV_TILE, SPLIT=GPU_KV_SPLIT, PAGE=page_size, PDL=pdl,
        num_warps=rows // 16, num_stages=num_stages(rows, block_dh, q.device, 3),
        enable_fp_fusion=False, launch_pdl=pdl,
    )  # fmt: skip
    return None


def _own_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    decode: DecodeEntries,
    table: Tensor,
    page_size: int,
    scale: float,
) -> None:
    """Write the entries' rows of output: a program for each split that one reads for itself."""
    prefixes, num_heads, (num_kv, head_dim) = decode.prefixes, q.shape[1], k.shape[1:]
    own = num_heads // num_kv * decode.max_queries  # rows of an entry
    rows = max(_LEAST_ROWS, triton.next_power_of_2(own))
    num_seqs, own_splits = len(decode.table_rows), triton.cdiv(decode.max_own, GPU_KV_SPLIT)
    (part_max, part_sum, part_acc), pdl = parts, supported(q.device)
    block_dh = part_acc.shape[1]
    # Few programs: each keeps more of its own loads in flight. Many: they hide each other's.
    is_few = num_kv * num_seqs * own_splits <= 1.5 * num_sms(q.device)
    _decode_kernel[(num_kv, num_seqs, own_splits)](
        q_ptr=q, k_ptr=k, v_ptr=v, o_ptr=output, max_ptr=part_max, sum_ptr=part_sum,
        acc_ptr=part_acc, counters=decode.counters,
        prefix_lens=decode.context_lens if prefixes is None else prefixes.of_entry,
        query_starts=decode.query_starts, query_lens=decode.query_lens,
        table_rows=decode.table_rows, context_lens=decode.context_lens, pages_ptr=table,
        max_pages=table.stride(0), q_stride=q.stride(0), q_head=q.stride(1), stride=k.stride(0),
        kv_head=k.stride(1), qk_scale=scale * LOG2E,
        max_splits=triton.cdiv(decode.max_context, GPU_KV_SPLIT), NUM_KV=num_kv,
        GROUP=num_heads // num_kv, QUERIES=decode.max_queries, DH=head_dim, BLOCK_DH=block_dh,
        ROWS=rows, TILE=GPU_KV_TILE, SPLIT=GPU_KV_SPLIT, PAGE=page_size,
        SHARED=prefixes is not None, PDL=pdl, num_warps=4 if rows < 64 else 8,
        num_stages=num_stages(rows, block_dh, q.device, 3 if is_few else 2),
        enable_fp_fusion=False, launch_pdl=pdl,
    )  # fmt: skip


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    decode: DecodeEntries,
    table: Tensor,
    page_size: int,
    scale: float,
    reads_ahead: bool = True,
) -> None:
    """Write the entries' rows of output [T, Hq, Dh]; table [tables, max_pages] int32.

    q [T, Hq, Dh]; k, v [kv_slots, Hkv, Dh]; reads_ahead: see AttentionKind.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv, num_seqs = k.shape[1], len(decode.table_rows)
    own = num_heads // num_kv * decode.max_queries  # rows of an entry
    max_splits = triton.cdiv(decode.max_context, GPU_KV_SPLIT)
    has_parts = max_splits > 1 or decode.prefixes is not None
    count = num_seqs * num_kv * own * max_splits if has_parts else 0
    part_max, part_sum = (torch.empty(count, device=q.device) for _ in range(2))
    block_dh = max(64, triton.next_power_of_2(head_dim))
    parts = part_max, part_sum, torch.empty(count, block_dh, device=q.device)
    if decode.prefixes is not None:
        _prefix_parts(q, k, v, parts, decode, table, page_size, scale, reads_ahead)
    own_splits = triton.cdiv(decode.max_own, GPU_KV_SPLIT)
    if fits(k, v, page_size, num_seqs, own, own_splits, max_splits):
        own_attention(
            q, k, v, output, parts, decode, table, page_size, scale * LOG2E, max_splits, reads_ahead
        )  # fmt: skip
    else:
        _own_parts(q, k, v, output, parts, decode, table, page_size, scale)
