"""attention of prefill and training on Hopper: two warpgroups with 64 query rows each, one loads.

See hopper_tiles.py; the portable kernel beside it, attention.py, gives the same bits: of keys and
values that are finite as far as the context goes.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from samebit.kernels.contract import GPU_KV_SPLIT, GPU_KV_TILE
from samebit.kernels.gpu.hopper_tiles import (
    COLUMNS,
    WARPGROUP_ROWS,
    attend_tiles,
    box_rows,
    descriptor,
    load_tile,
    make_barriers,
    make_ones,
    row_of,
    takes,
    tile_rows,
    turn_of,
)

_ROWS = 2 * WARPGROUP_ROWS
_STAGES = 2


@gluon.jit
def _produce(k_desc, v_desc, v_ptr, k_smem, v_smem, k_full, v_full, k_empty, v_empty, pages_ptr,
             key_start, context_len, end, column, stride, DH: gl.constexpr, TILE: gl.constexpr,
             BOX: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, PAGED: gl.constexpr,
             PAGE: gl.constexpr):  # fmt: skip
    """The warps that load."""
    CHUNK: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DH, DH // 8], [4, 1], [1, 0])
    for n0 in range(0, end, TILE):
        stage, phase = turn_of(n0 // TILE, STAGES)
        k_tile, v_tile = k_smem.index(stage), v_smem.index(stage)
        rows = tile_rows(pages_ptr, key_start, n0, context_len, TILE, BOX, PAGED, PAGE)
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        load_tile(k_desc, column, k_tile, k_full.index(stage), rows, BOX, COLUMNS)
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        if n0 + TILE <= context_len:
            load_tile(v_desc, column, v_tile, v_full.index(stage), rows, BOX, COLUMNS)
        else:  # what lies behind the context may be anything: zeros in its place
            for chunk in gl.static_range(TILE // CHUNK):
                n = n0 + chunk * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
                row = row_of(pages_ptr, key_start, n, context_len, PAGED, PAGE).to(gl.int64)
                d = gl.arange(0, DH, layout=gl.SliceLayout(0, layout))
                value = gl.load(
                    v_ptr + (row * stride + column)[:, None] + d[None, :],
                    mask=(n < context_len)[:, None], other=0.0,
                )  # fmt: skip
                v_tile.slice(chunk * CHUNK, CHUNK, dim=0).store(value)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(v_full.index(stage), count=1)


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
    orow: gl.constexpr = gl.SliceLayout(1, omma)
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DH, DH // 8], [4, 1], [1, 0])
    local = row0 + gl.arange(0, M, layout=gl.SliceLayout(1, loads))
    d = gl.arange(0, DH, layout=gl.SliceLayout(0, loads))
    place = (first + local).to(gl.int64) * q_stride + head * q_head
    q = gl.load(q_ptr + place[:, None] + d[None, :], mask=(local < query_len)[:, None], other=0.0)
    q_smem.store(q)
    fence_async_shared()

    position = context_len - query_len + row0 + gl.arange(0, M, layout=gl.SliceLayout(1, smma))
    whole = context_len - query_len + row0 + 1
    m, total, acc = attend_tiles(
        q_smem, k_smem, v_smem, ones, main_smem, k_full, v_full, k_empty, v_empty, 0, 0, end,
        position, whole, qk_scale, DH, TILE, SPLIT, STAGES, True, ONE_SPLIT,
    )  # fmt: skip
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
    ones = make_ones(TILE)
    k_full, k_empty = make_barriers(STAGES, 2)
    v_full, v_empty = make_barriers(STAGES, 2)
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


def fits(k: Tensor, v: Tensor, tile_rows: int, page_size: int | None) -> bool:
    """Whether `prefill_attention` takes these heads, tiles and pages (None: packed keys)."""
    return tile_rows == _ROWS and takes(k, v, page_size)


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
    box = box_rows(None if table is None else plan.page_size)
    _hopper_kernel[(num_heads, len(plan.tile_seq))](
        q_ptr=q, k_desc=descriptor(k, box), v_desc=descriptor(v, box), v_ptr=v, o_ptr=output,
        lse_ptr=lse, query_starts=plan.query_starts, key_starts=plan.key_starts,
        query_lens=plan.query_lens, context_lens=plan.context_lens,
        pages_ptr=plan.query_starts if table is None else table, tile_seq=plan.tile_seq,
        tile_start=plan.tile_start, max_pages=0 if table is None else table.stride(0),
        num_tokens=num_tokens, q_stride=q.stride(0), q_head=q.stride(1), stride=k.stride(0),
        kv_head=k.stride(1), qk_scale=qk_scale, HEADS=num_heads, GROUP=num_heads // k.shape[1],
        DH=head_dim, ROWS=_ROWS, TILE=GPU_KV_TILE, SPLIT=GPU_KV_SPLIT, BOX=box, COLUMNS=COLUMNS,
        STAGES=_STAGES, PAGED=table is not None, PAGE=plan.page_size, LSE=lse.shape[1] > 0,
        ONE_SPLIT=plan.longest <= GPU_KV_SPLIT, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
