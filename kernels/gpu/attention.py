"""attention on the GPU: KV tiles and splits at absolute positions, ordered merge, tensor cores.

Within a split, an online softmax over tiles of KV_TILE keys; it restarts at each split, and the
splits' (max, sum, accumulator) merge in ascending order. exp2 (ex2.approx), explicit fma, fusion
off. P is rounded to bf16 and its row sum goes through the tensor core, because a plain row sum
depends on the tile's height. So decode (a split per program, merged by a second kernel) and prefill
or training (splits looped in registers, tiles of 64 or 128 rows) give the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from samebit.kernels.attention import GPU_KV_SPLIT as KV_SPLIT
from samebit.kernels.attention import GPU_KV_TILE as KV_TILE

_LOG2E = 1.4426950408889634
_LN2 = 0.6931471805599453
_DECODE_ROWS = 16


@dataclass(frozen=True)
class GpuAttentionPlan:
    """Device metadata of one batch. Sequences with one new token decode, the others prefill."""

    query_starts: torch.Tensor  # [B] int32: first row of each sequence among the T queries
    key_starts: torch.Tensor  # [B] int32: first row of each sequence's keys, packed form only
    query_lens: torch.Tensor  # [B] int32
    context_lens: torch.Tensor  # [B] int32
    page_table: torch.Tensor | None  # [B, max_pages] int32
    page_size: int
    decode_seqs: torch.Tensor  # int32, indices into B
    longest_decode: int  # context length of the longest decoding sequence
    tile_seq: torch.Tensor  # int32, sequence of each query tile
    tile_start: torch.Tensor  # int32, its first query in that sequence
    tile_rows: int
    seq_lens: tuple[int, ...]  # packed form: host copy for the backward


def plan(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_table: torch.Tensor | None,
    page_size: int,
    device: torch.device,
) -> GpuAttentionPlan:
    """See kernels.attention.plan_paged and plan_packed; page_table None means packed."""
    queries, contexts = np.asarray(query_lens), np.asarray(context_lens)
    starts = np.concatenate([[0], np.cumsum(queries)[:-1]])
    decoding = (queries == 1) & (page_table is not None)
    prefilling = np.flatnonzero(~decoding)
    longest = int(queries[prefilling].max()) if len(prefilling) else 0
    tile_rows = 128 if longest > 64 else 64
    counts = -(-queries[prefilling] // tile_rows)
    tile_seq = np.repeat(prefilling, counts)
    tile_start = (
        np.arange(len(tile_seq)) - np.repeat(np.cumsum(counts) - counts, counts)
    ) * tile_rows
    # The tiles with the longest context first: they finish last otherwise.
    order = np.argsort(-(contexts[tile_seq] - queries[tile_seq] + tile_start), kind="stable")
    longest_context = int(contexts[decoding].max()) if decoding.any() else 0

    def to_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(device, non_blocking=True)

    return GpuAttentionPlan(
        query_starts=to_device(starts),
        key_starts=to_device(starts),
        query_lens=to_device(queries),
        context_lens=to_device(contexts),
        page_table=None if page_table is None else page_table.to(device, torch.int32),
        page_size=page_size,
        decode_seqs=to_device(np.flatnonzero(decoding)),
        longest_decode=longest_context,
        tile_seq=to_device(tile_seq[order]),
        tile_start=to_device(tile_start[order]),
        tile_rows=tile_rows,
        seq_lens=tuple(int(n) for n in queries),
    )


@triton.jit
def _split_pass(
    q, k_ptr, v_ptr, pages, key_start, position, lo, hi, stride, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PAGED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [lo, hi) of one split: running max, sum and accumulator."""
    d = tl.arange(0, BLOCK_D)
    ones = tl.full((TILE, 16), 1.0, tl.bfloat16)
    m = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for n0 in range(lo, hi, TILE):
        n = n0 + tl.arange(0, TILE)
        live = n < hi
        if PAGED:
            page = tl.load(pages + n // PAGE, mask=live, other=0)
            row = page.to(tl.int64) * PAGE + n % PAGE
        else:
            row = (key_start + n).to(tl.int64)
        inside = live[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + row[:, None] * stride + d[None, :], mask=inside, other=0.0)
        seen = live[None, :] & (n[None, :] <= position[:, None])
        s = tl.where(seen, tl.dot(q, tl.trans(k)) * qk_scale, -1e30)
        new_m = tl.maximum(m, tl.max(s, 1))
        rescale = tl.exp2(m - new_m)
        p = tl.where(seen, tl.exp2(s - new_m[:, None]), 0.0).to(tl.bfloat16)
        v = tl.load(v_ptr + row[:, None] * stride + d[None, :], mask=inside, other=0.0)
        total = tl.fma(total, rescale, tl.max(tl.dot(p, ones), 1))
        acc = tl.dot(p, v, acc * rescale[:, None])
        m = new_m
    return m, total, acc


@triton.jit
def _merge(m, total, acc, next_m, next_total, next_acc):
    new_m = tl.maximum(m, next_m)
    a, b = tl.exp2(m - new_m), tl.exp2(next_m - new_m)
    total = tl.fma(total, a, next_total * b)
    return new_m, total, tl.fma(acc, a[:, None], next_acc * b[:, None])


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, query_starts, key_starts, query_lens, context_lens,
    pages_ptr, tile_seq, tile_start, max_pages, num_tokens, q_stride, q_head, stride, kv_head,
    qk_scale, N, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, PAGED: tl.constexpr, PAGE: tl.constexpr,
    LSE: tl.constexpr,
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
    d = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (d < D)[None, :]
    q = tl.load(
        q_ptr + row[:, None] * q_stride + head * q_head + d[None, :], mask=inside, other=0.0
    )
    end = tl.minimum(context_len - query_len + start + ROWS, context_len)
    k_head = k_ptr + (head // GROUP) * kv_head
    v_head = v_ptr + (head // GROUP) * kv_head
    pages = pages_ptr + seq.to(tl.int64) * max_pages
    key_start = tl.load(key_starts + seq)
    m = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for s0 in range(0, end, SPLIT):
        next_m, next_total, next_acc = _split_pass(
            q, k_head, v_head, pages, key_start, position, s0, tl.minimum(s0 + SPLIT, end), stride,
            qk_scale, D, BLOCK_D, ROWS, TILE, PAGED, PAGE,
        )  # fmt: skip
        m, total, acc = _merge(m, total, acc, next_m, next_total, next_acc)
    out = o_ptr + (row[:, None] * N + head) * D + d[None, :]
    tl.store(out, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=inside)
    if LSE:
        lse = (m + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + head.to(tl.int64) * num_tokens + row, lse, mask=live)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, max_ptr, sum_ptr, acc_ptr, query_starts, context_lens, pages_ptr,
    decode_seqs, max_pages, q_stride, q_head, stride, kv_head, qk_scale, max_splits,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    entry, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq = tl.load(decode_seqs + entry)
    context_len = tl.load(context_lens + seq)
    if split * SPLIT >= context_len:
        return
    r = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(query_starts + seq).to(tl.int64)
    inside = (r < GROUP)[:, None] & (d < D)[None, :]
    heads = (kv * GROUP + r)[:, None]
    q = tl.load(q_ptr + row * q_stride + heads * q_head + d[None, :], mask=inside, other=0.0)
    position = tl.zeros((ROWS,), tl.int32) + context_len - 1
    m, total, acc = _split_pass(
        q, k_ptr + kv * kv_head, v_ptr + kv * kv_head, pages_ptr + seq.to(tl.int64) * max_pages, 0,
        position, split * SPLIT, tl.minimum(split * SPLIT + SPLIT, context_len), stride, qk_scale,
        D, BLOCK_D, ROWS, TILE, True, PAGE,
    )  # fmt: skip
    place = ((entry.to(tl.int64) * NUM_KV + kv) * max_splits + split) * ROWS + r
    tl.store(max_ptr + place, m)
    tl.store(sum_ptr + place, total)
    tl.store(acc_ptr + place[:, None] * BLOCK_D + d[None, :], acc)


@triton.jit
def _combine_kernel(
    max_ptr, sum_ptr, acc_ptr, o_ptr, query_starts, context_lens, decode_seqs, max_splits, N,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    entry, kv = tl.program_id(0), tl.program_id(1)
    seq = tl.load(decode_seqs + entry)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    m = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for split in range(0, tl.cdiv(tl.load(context_lens + seq), SPLIT)):
        place = ((entry.to(tl.int64) * NUM_KV + kv) * max_splits + split) * ROWS + r
        part = tl.load(acc_ptr + place[:, None] * BLOCK_D + d[None, :])
        m, total, acc = _merge(
            m, total, acc, tl.load(max_ptr + place), tl.load(sum_ptr + place), part
        )
    row = tl.load(query_starts + seq).to(tl.int64)
    out = o_ptr + (row * N + (kv * GROUP + r)[:, None]) * D + d[None, :]
    inside = (r < GROUP)[:, None] & (d < D)[None, :]
    tl.store(out, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=inside)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: GpuAttentionPlan,
    scale: float,
    *,
    kv_tile: int = KV_TILE,
    kv_split: int = KV_SPLIT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, N, H]; k, v [slots, K, H] -> (output [T, N, H], log-sum-exp [N, T], prefill only)."""
    if q.dtype != torch.bfloat16:
        raise ValueError(f"attention on the GPU takes torch.bfloat16, got {q.dtype}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], 0 if plan.page_table is not None else q.shape[0], device=q.device)
    if len(plan.decode_seqs):
        _decode(q, k, v, output, plan, scale, kv_tile, kv_split)
    if len(plan.tile_seq):
        _prefill(q, k, v, output, lse, plan, scale, kv_tile, kv_split)
    return output, lse


def _prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    plan: GpuAttentionPlan,
    scale: float,
    kv_tile: int,
    kv_split: int,
) -> None:
    num_heads, head_dim = q.shape[1:]
    table = plan.page_table
    block_d = triton.next_power_of_2(head_dim)
    grid = (num_heads, len(plan.tile_seq))
    _prefill_kernel[grid](
        q, k, v, output, lse, plan.query_starts, plan.key_starts, plan.query_lens,
        plan.context_lens, q if table is None else table, plan.tile_seq, plan.tile_start,
        0 if table is None else table.stride(0), q.shape[0], q.stride(0), q.stride(1), k.stride(0),
        k.stride(1), scale * _LOG2E, num_heads, num_heads // k.shape[1], head_dim, block_d,
        plan.tile_rows, kv_tile, kv_split, table is not None, plan.page_size, lse.shape[1] > 0,
        num_warps=8 if plan.tile_rows == 128 else 4, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip


def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    plan: GpuAttentionPlan,
    scale: float,
    kv_tile: int,
    kv_split: int,
) -> None:
    num_heads, head_dim = q.shape[1:]
    num_kv, table = k.shape[1], plan.page_table
    group = num_heads // num_kv
    rows = max(_DECODE_ROWS, triton.next_power_of_2(group))
    block_d = triton.next_power_of_2(head_dim)
    num_seqs, max_splits = len(plan.decode_seqs), triton.cdiv(plan.longest_decode, kv_split)
    assert table is not None
    shape = (num_seqs, num_kv, max_splits, rows)
    part_max, part_sum = (torch.empty(shape, device=q.device) for _ in range(2))
    part_acc = torch.empty(*shape, block_d, device=q.device)
    _decode_kernel[(num_seqs, num_kv, max_splits)](
        q, k, v, part_max, part_sum, part_acc, plan.query_starts, plan.context_lens, table,
        plan.decode_seqs, table.stride(0), q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        scale * _LOG2E, max_splits, num_kv, group, head_dim, block_d, rows, kv_tile, kv_split,
        plan.page_size, num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    _combine_kernel[(num_seqs, num_kv)](
        part_max, part_sum, part_acc, output, plan.query_starts, plan.context_lens,
        plan.decode_seqs, max_splits, num_heads, num_kv, group, head_dim, block_d, rows, kv_split,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    plan: GpuAttentionPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of packed q, k, v by torch's flash-attention backward in deterministic mode."""
    lens = torch.tensor((0, *plan.seq_lens), dtype=torch.int32)
    cumulative = lens.cumsum(0, dtype=torch.int32).to(q.device)
    longest = max(plan.seq_lens)
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), output, lse,
            cumulative, cumulative, longest, longest, 0.0, True, unused,
            torch.empty(0, dtype=torch.uint64, device=q.device), scale=scale,
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
