"""attention of decode steps on the GPU: one program for each split, the last one merges.

A sequence's last program to arrive merges the splits' (max, sum, accumulator) in ascending order,
so the result does not depend on who that is.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from samebit.kernels.contract import GPU_KV_SPLIT, GPU_KV_TILE
from samebit.kernels.gpu.online_softmax import merge, split_pass
from samebit.kernels.gpu.pdl import after_previous, prefetch_l2, supported

LOG2E = 1.4426950408889634
_ROWS = 16
_MAX_KV_HEADS = 128


@dataclass(frozen=True)
class DecodeEntries:
    """The sequences with one new token; a context of 0 marks what only fills a batch up."""

    query_rows: Tensor  # [E] int32, among the T queries
    table_rows: Tensor  # [E] int32, rows of the page table
    context_lens: Tensor  # [E] int32, the new token included
    max_context: int  # bound of context_lens
    counters: Tensor  # [E * _MAX_KV_HEADS] int32, zeros between kernels: arrived splits


def decode_entries(
    query_rows: Tensor, table_rows: Tensor, context_lens: Tensor, max_context: int
) -> DecodeEntries:
    """Entries whose tensors are these [E] int32, with counters of their own."""
    counters = query_rows.new_zeros(len(query_rows) * _MAX_KV_HEADS)
    return DecodeEntries(query_rows, table_rows, context_lens, max_context, counters)


@triton.jit(do_not_specialize=["max_pages", "max_splits"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, max_ptr, sum_ptr, acc_ptr, counters, query_rows, table_rows,
    context_lens, pages_ptr, max_pages, q_stride, q_head, stride, kv_head, qk_scale, max_splits,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, DH: tl.constexpr, BLOCK_DH: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and KV head; the last to arrive merges the splits in order."""
    kv, entry, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens + entry)
    row = tl.load(query_rows + entry).to(tl.int64)
    pages = pages_ptr + tl.load(table_rows + entry).to(tl.int64) * max_pages
    k_head, v_head = k_ptr + kv * kv_head, v_ptr + kv * kv_head
    lo = split * SPLIT
    if PDL:  # the first tile, while the preceding kernel still runs
        n = lo + tl.arange(0, TILE)
        page = tl.load(pages + n // PAGE, mask=n < context_len, other=0).to(tl.int64)
        lines = ((page * PAGE + n % PAGE) * stride)[:, None] + (tl.arange(0, BLOCK_DH // 64) * 64)
        prefetch_l2(k_head + lines)
        prefetch_l2(v_head + lines)
    after_previous(PDL)
    if lo >= context_len:
        return
    r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_DH)
    inside = (r < GROUP)[:, None] & (d < DH)[None, :]
    heads = (kv * GROUP + r)[:, None]
    q = tl.load(q_ptr + row * q_stride + heads * q_head + d[None, :], mask=inside, other=0.0)
    position = tl.zeros((ROWS,), tl.int32) + context_len - 1
    hi = tl.minimum(lo + SPLIT, context_len)
    m, total, acc = split_pass(
        q=q, k_ptr=k_head, v_ptr=v_head, pages=pages, key_start=0, position=position, lo=lo,
        whole=hi, hi=hi, stride=stride, qk_scale=qk_scale, DH=DH, BLOCK_DH=BLOCK_DH, ROWS=ROWS,
        TILE=TILE, SPLIT=SPLIT, PAGED=True, PAGE=PAGE, UNMASKED=False,
    )  # fmt: skip
    num_splits = tl.cdiv(context_len, SPLIT)
    out = o_ptr + (row * NUM_KV * GROUP + heads) * DH + d[None, :]
    if num_splits == 1:
        tl.store(out, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=inside)
        return
    whose = entry.to(tl.int64) * NUM_KV + kv
    place = (whose * max_splits + split) * GROUP + r
    tl.store(max_ptr + place, m, mask=r < GROUP)
    tl.store(sum_ptr + place, total, mask=r < GROUP)
    tl.store(acc_ptr + place[:, None] * BLOCK_DH + d[None, :], acc, mask=(r < GROUP)[:, None])
    tl.debug_barrier()  # every thread's part is written before the arrival is counted
    if tl.atomic_add(counters + whose, 1, sem="acq_rel") != num_splits - 1:
        return
    m, total = tl.full((ROWS,), -1e30, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DH), tl.float32)
    for s in range(0, num_splits):
        place = (whose * max_splits + s) * GROUP + r
        part_m = tl.load(max_ptr + place, mask=r < GROUP, other=-1e30, cache_modifier=".cg")
        part = tl.load(sum_ptr + place, mask=r < GROUP, other=0.0, cache_modifier=".cg")
        part_acc = tl.load(
            acc_ptr + place[:, None] * BLOCK_DH + d[None, :], mask=(r < GROUP)[:, None], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        m, total, acc = merge(m, total, acc, part_m, part, part_acc)
    tl.store(out, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(counters + whose, 0)


@functools.lru_cache(maxsize=8)
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of the card."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    decode: DecodeEntries,
    table: Tensor,
    page_size: int,
    scale: float,
) -> None:
    """Write output rows [query_rows, Hq, Dh] of the entries; table [tables, max_pages] int32.

    q [T, Hq, Dh]; k, v [kv_slots, Hkv, Dh].
    """
    num_heads, head_dim = q.shape[1:]
    num_kv = k.shape[1]
    group = num_heads // num_kv
    rows = max(_ROWS, triton.next_power_of_2(group))
    block_dh = max(64, triton.next_power_of_2(head_dim))
    num_seqs, max_splits = len(decode.query_rows), triton.cdiv(decode.max_context, GPU_KV_SPLIT)
    parts = num_seqs * num_kv * group * (max_splits if max_splits > 1 else 0)
    part_max, part_sum = (torch.empty(parts, device=q.device) for _ in range(2))
    part_acc = torch.empty(parts, block_dh, device=q.device)
    pdl = supported(q.device)
    # Few programs: each keeps more of its own loads in flight. Many: they hide each other's.
    num_stages = 3 if num_kv * num_seqs * max_splits <= 1.5 * num_sms(q.device) else 2
    _decode_kernel[(num_kv, num_seqs, max_splits)](
        q_ptr=q, k_ptr=k, v_ptr=v, o_ptr=output, max_ptr=part_max, sum_ptr=part_sum,
        acc_ptr=part_acc, counters=decode.counters, query_rows=decode.query_rows,
        table_rows=decode.table_rows, context_lens=decode.context_lens, pages_ptr=table,
        max_pages=table.stride(0), q_stride=q.stride(0), q_head=q.stride(1), stride=k.stride(0),
        kv_head=k.stride(1), qk_scale=scale * LOG2E, max_splits=max_splits, NUM_KV=num_kv,
        GROUP=group, DH=head_dim, BLOCK_DH=block_dh, ROWS=rows, TILE=GPU_KV_TILE,
        SPLIT=GPU_KV_SPLIT, PAGE=page_size, PDL=pdl, num_warps=4, num_stages=num_stages,
        enable_fp_fusion=False, launch_pdl=pdl,
    )  # fmt: skip
