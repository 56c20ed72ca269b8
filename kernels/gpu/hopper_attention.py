"""attention of prefill and training on Hopper: tiles come by TMA, two warpgroups compute.

The same operations in the same order as split_pass (online_softmax.py), so the same bits: what
differs is when they run. A warp loads tiles of keys and values ahead; each warpgroup has 64 query
rows, and its tensor cores multiply one tile's weights and values and the next tile's scores while
it exponentiates. Source of the schedule: Shah et al. 2024, arXiv 2407.08608.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from samebit.kernels.contract import GPU_KV_SPLIT, GPU_KV_TILE
from samebit.kernels.gpu.card import has_wgmma

ROWS = 128
_COLUMNS = 64  # of bf16, in the 128 bytes that shared memory is swizzled by
_STAGES = 2
_LOWEST = gl.constexpr(-1e30)


@gluon.jit
def _turn(number, STAGES: gl.constexpr):
    """(stage, phase of its barriers) of a tile by its number."""
    return number % STAGES, number // STAGES & 1


@gluon.jit
def _row_of(pages_ptr, key_start, n, hi, PAGED: gl.constexpr, PAGE: gl.constexpr):
    """Rows of keys n in the cache or the packed keys; some row where n is beyond hi."""
    if PAGED:
        page = gl.load(pages_ptr + n // PAGE, mask=n < hi, other=0)
        row = page * PAGE + n % PAGE
    else:
        row = key_start + n
    return row


@gluon.jit
def _load_tile(desc, column, smem, bar, pages_ptr, key_start, n0, hi, DH: gl.constexpr,
               TILE: gl.constexpr, BOX: gl.constexpr, COLUMNS: gl.constexpr, PAGED: gl.constexpr,
               PAGE: gl.constexpr):  # fmt: skip
    """Have the tile of keys [n0, n0 + TILE) come to shared memory; the barrier tells when."""
    mbarrier.expect(bar, TILE * DH * 2)
    for box in gl.static_range(TILE // BOX):
        row = _row_of(pages_ptr, key_start, n0 + box * BOX, hi, PAGED, PAGE)
        rows = smem.slice(box * BOX, BOX, dim=0)
        for part in gl.static_range(DH // COLUMNS):
            tma.async_copy_global_to_shared(
                desc,
                [row, column + part * COLUMNS],
                bar,
                rows.slice(part * COLUMNS, COLUMNS, dim=1),
            )


@gluon.jit
def _produce(k_desc, v_desc, v_ptr, k_smem, v_smem, k_full, v_full, k_empty, v_empty, pages_ptr,
             key_start, context_len, end, column, stride, DH: gl.constexpr, TILE: gl.constexpr,
             BOX: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, PAGED: gl.constexpr,
             PAGE: gl.constexpr):  # fmt: skip
    """The warp that loads."""
    CHUNK: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DH, DH // 8], [4, 1], [1, 0])
    for n0 in range(0, end, TILE):
        stage, phase = _turn(n0 // TILE, STAGES)
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        _load_tile(
            k_desc, column, k_smem.index(stage), k_full.index(stage), pages_ptr, key_start, n0,
            context_len, DH, TILE, BOX, COLUMNS, PAGED, PAGE,
        )  # fmt: skip
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        if n0 + TILE <= context_len:
            _load_tile(
                v_desc, column, v_smem.index(stage), v_full.index(stage), pages_ptr, key_start, n0,
                context_len, DH, TILE, BOX, COLUMNS, PAGED, PAGE,
            )  # fmt: skip
        else:  # what lies behind the context may be anything: zeros in its place
            tile = v_smem.index(stage)
            for chunk in gl.static_range(TILE // CHUNK):
                n = n0 + chunk * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
                row = _row_of(pages_ptr, key_start, n, context_len, PAGED, PAGE).to(gl.int64)
                d = gl.arange(0, DH, layout=gl.SliceLayout(0, layout))
                value = gl.load(
                    v_ptr + (row * stride + column)[:, None] + d[None, :],
                    mask=(n < context_len)[:, None], other=0.0,
                )  # fmt: skip
                tile.slice(chunk * CHUNK, CHUNK, dim=0).store(value)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(v_full.index(stage), count=1)


@gluon.jit
def _weights(scores, m, position, n0, whole, qk_scale, mma: gl.constexpr, TILE: gl.constexpr):
    """(weights in fp32, the new maximum, what earlier sums are scaled by) of a tile of scores."""
    s = scores * qk_scale
    if n0 + TILE > whole:
        n = n0 + gl.arange(0, TILE, layout=gl.SliceLayout(0, mma))
        s = gl.where(n[None, :] <= position[:, None], s, float("-inf"))
    new_m = gl.maximum(m, gl.max(s, 1))
    rescale = gl.exp2(m - new_m)
    return gl.exp2(s - new_m[:, None]), new_m, rescale


@gluon.jit
def _merge(m, total, next_m, next_total):
    """(max, sum, factor of the earlier part, of the later one): as merge in online_softmax.py."""
    new_m = gl.maximum(m, next_m)
    a, b = gl.exp2(m - new_m), gl.exp2(next_m - new_m)
    return new_m, gl.fma(total, a, next_total * b), a, b


@gluon.jit
def _consume(
    q_ptr, o_ptr, lse_ptr, q_smem, k_smem, v_smem, ones, main_smem, k_full, v_full, k_empty,
    v_empty, row0, first, query_len, context_len, end, head, num_tokens, q_stride, q_head, qk_scale,
    HEADS, DH: gl.constexpr, TILE: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
    LSE: gl.constexpr, ONE_SPLIT: gl.constexpr,
):  # fmt: skip
    """A warpgroup with the 64 query rows from row0 of a sequence; first: its first row of all."""
    M: gl.constexpr = 64
    smma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    omma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH, 16])
    tmma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, omma, 2)
    srow: gl.constexpr = gl.SliceLayout(1, smma)
    orow: gl.constexpr = gl.SliceLayout(1, omma)

    loads: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DH, DH // 8], [4, 1], [1, 0])
    local = row0 + gl.arange(0, M, layout=gl.SliceLayout(1, loads))
    d = gl.arange(0, DH, layout=gl.SliceLayout(0, loads))
    place = (first + local).to(gl.int64) * q_stride + head * q_head
    q = gl.load(q_ptr + place[:, None] + d[None, :], mask=(local < query_len)[:, None], other=0.0)
    q_smem.store(q)
    fence_async_shared()

    position = context_len - query_len + row0 + gl.arange(0, M, layout=srow)
    whole = context_len - query_len + row0 + 1
    m = gl.full((M,), _LOWEST, gl.float32, srow)
    total = gl.zeros((M,), gl.float32, orow)
    acc = gl.zeros((M, DH), gl.float32, omma)
    none = gl.zeros((M, TILE), gl.float32, smma)
    no_sum = gl.zeros((M, 8), gl.float32, tmma)
    main_m, main_total = gl.convert_layout(m, orow), total

    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q_smem, k_smem.index(0).permute((1, 0)), none, use_acc=False)
    mbarrier.arrive(k_empty.index(0), count=1)
    p, m, rescale = _weights(scores, m, position, 0, whole, qk_scale, smma, TILE)
    p = gl.convert_layout(p.to(gl.bfloat16), weights)
    for n0 in range(TILE, end, TILE):
        stage, phase = _turn(n0 // TILE, STAGES)
        before, its_phase = _turn(n0 // TILE - 1, STAGES)
        mbarrier.wait(k_full.index(stage), phase)
        scores = warpgroup_mma(
            q_smem, k_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(before), its_phase)
        acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
        row_sum = warpgroup_mma(p, ones, no_sum, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(2, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        old_m = m
        if not ONE_SPLIT:
            m = gl.where(n0 % SPLIT == 0, gl.full((M,), _LOWEST, gl.float32, srow), m)
        next_p, m, next_rescale = _weights(scores, m, position, n0, whole, qk_scale, smma, TILE)
        acc, row_sum, p = warpgroup_mma_wait(0, deps=[acc, row_sum, p])
        mbarrier.arrive(v_empty.index(before), count=1)
        row_sum = gl.convert_layout(gl.max(row_sum, 1), orow)
        total = gl.fma(total, gl.convert_layout(rescale, orow), row_sum)
        if not ONE_SPLIT:  # noqa: SIM102 - a constant
            if n0 % SPLIT == 0:  # the split before is complete
                if n0 == SPLIT:
                    main_m, main_total = gl.convert_layout(old_m, orow), total
                    main_smem.store(acc)
                else:
                    main = main_smem.load(omma)
                    main_m, main_total, a, b = _merge(
                        main_m, main_total, gl.convert_layout(old_m, orow), total
                    )
                    main_smem.store(gl.fma(main, a[:, None], acc * b[:, None]))
                total = gl.zeros((M,), gl.float32, orow)
                acc = gl.zeros((M, DH), gl.float32, omma)
        rescale = next_rescale
        acc = acc * gl.convert_layout(rescale, orow)[:, None]
        p = gl.convert_layout(next_p.to(gl.bfloat16), weights)
    before, its_phase = _turn((end - 1) // TILE, STAGES)
    mbarrier.wait(v_full.index(before), its_phase)
    acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
    row_sum = warpgroup_mma(p, ones, no_sum, use_acc=False, is_async=True)
    acc, row_sum, p = warpgroup_mma_wait(0, deps=[acc, row_sum, p])
    total = gl.fma(
        total, gl.convert_layout(rescale, orow), gl.convert_layout(gl.max(row_sum, 1), orow)
    )
    m = gl.convert_layout(m, orow)
    if not ONE_SPLIT:  # noqa: SIM102 - a constant
        if end > SPLIT:
            main = main_smem.load(omma)
            m, total, a, b = _merge(main_m, main_total, m, total)
            acc = gl.fma(main, a[:, None], acc * b[:, None])
    local = row0 + gl.arange(0, M, layout=orow)
    live = local < query_len
    row = (first + local).to(gl.int64)
    column = gl.arange(0, DH, layout=gl.SliceLayout(0, omma))
    out = o_ptr + ((row * HEADS + head) * DH)[:, None] + column[None, :]
    gl.store(out, (acc / total[:, None]).to(gl.bfloat16), mask=live[:, None])
    if LSE:
        lse = (m + gl.log2(total)) * 0.6931471805599453
        gl.store(lse_ptr + head.to(gl.int64) * num_tokens + row, lse, mask=live)


@gluon.jit(do_not_specialize=["max_pages", "num_tokens"])
def _hopper_kernel(
    q_ptr, k_desc, v_desc, v_ptr, o_ptr, lse_ptr, query_starts, key_starts, query_lens,
    context_lens, pages_ptr, tile_seq, tile_start, max_pages, num_tokens, q_stride, q_head, stride,
    kv_head, qk_scale, HEADS, GROUP: gl.constexpr, DH: gl.constexpr, ROWS: gl.constexpr,
    TILE: gl.constexpr, SPLIT: gl.constexpr, BOX: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, PAGED: gl.constexpr, PAGE: gl.constexpr, LSE: gl.constexpr,
    ONE_SPLIT: gl.constexpr,
):  # fmt: skip
    head = gl.program_id(0)
    seq = gl.load(tile_seq + gl.program_id(1))
    start = gl.load(tile_start + gl.program_id(1))
    query_len = gl.load(query_lens + seq)
    context_len = gl.load(context_lens + seq)
    first = gl.load(query_starts + seq)
    key_start = gl.load(key_starts + seq)
    pages_ptr += seq.to(gl.int64) * max_pages
    end = gl.minimum(context_len - query_len + start + ROWS, context_len)
    column = head // GROUP * kv_head

    M: gl.constexpr = ROWS // 2
    operand: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [2, M, DH], operand)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DH], operand)
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DH], operand)
    main: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    main_smem = gl.allocate_shared_memory(
        gl.float32, [1 if ONE_SPLIT else 2, 8 if ONE_SPLIT else M, DH], main
    )
    filled: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    ones_smem = gl.allocate_shared_memory(gl.bfloat16, [8, TILE], operand)
    ones_smem.store(gl.full((8, TILE), 1.0, gl.bfloat16, filled))
    fence_async_shared()
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    ones = ones_smem.permute((1, 0))
    other: gl.constexpr = 0 if ONE_SPLIT else 1
    gl.warp_specialize(
        [
            (_consume, (
                q_ptr, o_ptr, lse_ptr, q_smem.index(0), k_smem, v_smem, ones, main_smem.index(0),
                k_full, v_full, k_empty, v_empty, start, first, query_len, context_len, end, head,
                num_tokens, q_stride, q_head, qk_scale, HEADS, DH, TILE, SPLIT, STAGES, LSE,
                ONE_SPLIT,
            )),
            (_consume, (
                q_ptr, o_ptr, lse_ptr, q_smem.index(1), k_smem, v_smem, ones,
                main_smem.index(other), k_full, v_full, k_empty, v_empty, start + M, first,
                query_len, context_len, end, head, num_tokens, q_stride, q_head, qk_scale, HEADS,
                DH, TILE, SPLIT, STAGES, LSE, ONE_SPLIT,
            )),
            (_produce, (
                k_desc, v_desc, v_ptr, k_smem, v_smem, k_full, v_full, k_empty, v_empty, pages_ptr,
                key_start, context_len, end, column, stride, DH, TILE, BOX, COLUMNS, STAGES, PAGED,
                PAGE,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip


def fits(q: Tensor, k: Tensor, tile_rows: int, page_size: int | None) -> bool:
    """Whether `prefill_attention` takes these heads, tiles and pages (None: packed keys)."""
    whole_boxes = page_size is None or GPU_KV_TILE % page_size == 0 or page_size % GPU_KV_TILE == 0
    aligned = all(x.data_ptr() % 16 == 0 for x in (q, k)) and k.stride(0) % 8 == 0
    return (
        has_wgmma(q.device)
        and tile_rows == ROWS
        and q.shape[2] in (64, 128)
        and whole_boxes
        and (page_size is None or page_size >= 16)
        and aligned
        and k.stride(1) % 8 == 0
    )


def _descriptor(x: Tensor, box: int) -> TensorDescriptor:
    """Boxes of so many rows of one head of x [kv_slots, Hkv, Dh]."""
    slots, heads, head_dim = x.shape
    return TensorDescriptor(
        x,
        [slots, (heads - 1) * x.stride(1) + head_dim],
        [x.stride(0), 1],
        [box, _COLUMNS],
        gl.NVMMASharedLayout(128, 16),
    )


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    plan: Any,
    qk_scale: float,
) -> None:
    """The prefilling tiles of a GpuAttentionPlan; arguments as in attention.attend."""
    num_tokens, num_heads, head_dim = q.shape
    table = plan.page_table
    box = GPU_KV_TILE if table is None else min(plan.page_size, GPU_KV_TILE)
    _hopper_kernel[(num_heads, len(plan.tile_seq))](
        q_ptr=q, k_desc=_descriptor(k, box), v_desc=_descriptor(v, box), v_ptr=v, o_ptr=output,
        lse_ptr=lse, query_starts=plan.query_starts, key_starts=plan.key_starts,
        query_lens=plan.query_lens, context_lens=plan.context_lens,
        pages_ptr=plan.query_starts if table is None else table, tile_seq=plan.tile_seq,
        tile_start=plan.tile_start, max_pages=0 if table is None else table.stride(0),
        num_tokens=num_tokens, q_stride=q.stride(0), q_head=q.stride(1), stride=k.stride(0),
        kv_head=k.stride(1), qk_scale=qk_scale, HEADS=num_heads, GROUP=num_heads // k.shape[1],
        DH=head_dim, ROWS=ROWS, TILE=GPU_KV_TILE, SPLIT=GPU_KV_SPLIT, BOX=box, COLUMNS=_COLUMNS,
        STAGES=_STAGES, PAGED=table is not None, PAGE=plan.page_size, LSE=lse.shape[1] > 0,
        ONE_SPLIT=plan.longest <= GPU_KV_SPLIT, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
