"""Tiles that decode entries share, on Hopper: programs take work items in turn, and never pause.

While a warpgroup computes one item the loading warps bring the next one's tiles, and the first ones
while the preceding kernel still runs: what is shared was written in earlier steps. See
hopper_tiles.py and decode_attention.py, whose portable kernel gives the same bits.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from samebit.kernels.contract import GPU_KV_SPLIT, GPU_KV_TILE
from samebit.kernels.gpu.card import num_sms
from samebit.kernels.gpu.hopper_tiles import (
    COLUMNS,
    WARPGROUP_ROWS,
    after_previous,
    attend_tiles,
    box_rows,
    descriptor,
    load_tile,
    make_barriers,
    make_ones,
    tile_rows,
    turn_of,
)

_STAGES = 3


@gluon.jit
def _produce(
    k_desc, v_desc, k_smem, v_smem, k_full, v_full, k_empty, v_empty, members, lens, num_items,
    items, table_rows, pages_ptr, max_pages, column, CAPACITY: gl.constexpr, DH: gl.constexpr,
    TILE: gl.constexpr, SPLIT: gl.constexpr, BOX: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, PAGE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """The warps that load."""
    turn = 0
    if not AHEAD:
        after_previous(False)
    for item in range(gl.program_id(1), gl.load(num_items), gl.num_programs(1)):
        task, split = gl.load(items + 2 * item), gl.load(items + 2 * item + 1)
        first = gl.load(table_rows + gl.load(members + task * CAPACITY)).to(gl.int64)
        pages, lo = pages_ptr + first * max_pages, split * SPLIT
        hi = gl.minimum(lo + SPLIT, gl.load(lens + task))
        for n0 in range(lo, hi, TILE):
            stage, phase = turn_of(turn, STAGES)
            k_tile, v_tile = k_smem.index(stage), v_smem.index(stage)
            rows = tile_rows(pages, 0, n0, hi, TILE, BOX, True, PAGE)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            load_tile(k_desc, column, k_tile, k_full.index(stage), rows, BOX, COLUMNS)
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            load_tile(v_desc, column, v_tile, v_full.index(stage), rows, BOX, COLUMNS)
            turn += 1


@gluon.jit
def _consume(
    q_ptr, max_ptr, sum_ptr, acc_ptr, q_smem, k_smem, v_smem, ones, k_full, v_full, k_empty,
    v_empty, members, lens, num_items, items, query_starts, query_lens, kv, r0, q_stride, q_head,
    qk_scale, max_splits, NUM_KV: gl.constexpr, GROUP: gl.constexpr, QUERIES: gl.constexpr,
    CAPACITY: gl.constexpr, DH: gl.constexpr, BLOCK_DH: gl.constexpr, TILE: gl.constexpr,
    SPLIT: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A warpgroup with the rows [r0, r0 + 64) of every item's task."""
    M: gl.constexpr = 64
    OWN: gl.constexpr = GROUP * QUERIES  # rows of an entry
    smma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    omma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH, 16])
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DH, DH // 8], [4, 1], [1, 0])
    r = r0 + gl.arange(0, M, layout=gl.SliceLayout(1, loads))
    d = gl.arange(0, DH, layout=gl.SliceLayout(0, loads))
    out_r = r0 + gl.arange(0, M, layout=gl.SliceLayout(1, omma))
    out_d = gl.arange(0, DH, layout=gl.SliceLayout(0, omma))
    nobody = gl.arange(0, M, layout=gl.SliceLayout(1, smma))
    turn = 0
    if PDL:
        after_previous(True)
    for item in range(gl.program_id(1), gl.load(num_items), gl.num_programs(1)):
        task, split = gl.load(items + 2 * item), gl.load(items + 2 * item + 1)
        entry, live = _entry(members, query_lens, task, r, OWN, GROUP, CAPACITY)
        row = gl.load(query_starts + entry).to(gl.int64) + r % OWN // GROUP
        place = row * q_stride + (kv * GROUP + r % GROUP) * q_head
        q = gl.load(q_ptr + place[:, None] + d[None, :], mask=live[:, None], other=0.0)
        q_smem.store(q)
        fence_async_shared()
        lo = split * SPLIT
        hi = gl.minimum(lo + SPLIT, gl.load(lens + task))
        m, total, acc = attend_tiles(
            q_smem, k_smem, v_smem, ones, q_smem, k_full, v_full, k_empty, v_empty, turn, lo, hi,
            nobody, hi, qk_scale, DH, TILE, SPLIT, STAGES, False, True,
        )  # fmt: skip
        turn += (hi - lo) // TILE
        entry, live = _entry(members, query_lens, task, out_r, OWN, GROUP, CAPACITY)
        part = ((entry.to(gl.int64) * NUM_KV + kv) * max_splits + split) * OWN + out_r % OWN
        gl.store(max_ptr + part, m, mask=live)
        gl.store(sum_ptr + part, total, mask=live)
        gl.store(acc_ptr + part[:, None] * BLOCK_DH + out_d[None, :], acc, mask=live[:, None])


@gluon.jit
def _entry(members, query_lens, task, r, OWN: gl.constexpr, GROUP: gl.constexpr,
           CAPACITY: gl.constexpr):  # fmt: skip
    """(entry, whether there is such a query) of a task's rows."""
    entry = gl.load(members + task * CAPACITY + r // OWN, mask=r // OWN < CAPACITY, other=-1)
    live = entry >= 0
    entry = gl.maximum(entry, 0)
    return entry, live & (r % OWN // GROUP < gl.load(query_lens + entry))


@gluon.jit(do_not_specialize=["max_pages", "max_splits"])
def _hopper_prefix_kernel(
    q_ptr, k_desc, v_desc, max_ptr, sum_ptr, acc_ptr, members, lens, num_items, items, query_starts,
    query_lens, table_rows, pages_ptr, max_pages, q_stride, q_head, kv_head, qk_scale, max_splits,
    NUM_KV: gl.constexpr, GROUP: gl.constexpr, QUERIES: gl.constexpr, CAPACITY: gl.constexpr,
    DH: gl.constexpr, BLOCK_DH: gl.constexpr, WARPGROUPS: gl.constexpr, TILE: gl.constexpr,
    SPLIT: gl.constexpr, BOX: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    PAGE: gl.constexpr, PDL: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """As _prefix_kernel in decode_attention.py."""
    kv = gl.program_id(0)
    M: gl.constexpr = 64
    operand: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [WARPGROUPS, M, DH], operand)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DH], operand)
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DH], operand)
    ones = make_ones(TILE)
    k_full, k_empty = make_barriers(STAGES, WARPGROUPS)
    v_full, v_empty = make_barriers(STAGES, WARPGROUPS)
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (
                    q_ptr, max_ptr, sum_ptr, acc_ptr, q_smem.index(0), k_smem, v_smem, ones, k_full,
                    v_full, k_empty, v_empty, members, lens, num_items, items, query_starts,
                    query_lens, kv, 0, q_stride, q_head, qk_scale, max_splits, NUM_KV, GROUP,
                    QUERIES, CAPACITY, DH, BLOCK_DH, TILE, SPLIT, STAGES, PDL,
                )),
                (_produce, (
                    k_desc, v_desc, k_smem, v_smem, k_full, v_full, k_empty, v_empty, members, lens,
                    num_items, items, table_rows, pages_ptr, max_pages, kv * kv_head, CAPACITY, DH,
                    TILE, SPLIT, BOX, COLUMNS, STAGES, PAGE, AHEAD,
                )),
            ],
            [4],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    q_ptr, max_ptr, sum_ptr, acc_ptr, q_smem.index(0), k_smem, v_smem, ones, k_full,
                    v_full, k_empty, v_empty, members, lens, num_items, items, query_starts,
                    query_lens, kv, 0, q_stride, q_head, qk_scale, max_splits, NUM_KV, GROUP,
                    QUERIES, CAPACITY, DH, BLOCK_DH, TILE, SPLIT, STAGES, PDL,
                )),
                (_consume, (
                    q_ptr, max_ptr, sum_ptr, acc_ptr, q_smem.index(1), k_smem, v_smem, ones, k_full,
                    v_full, k_empty, v_empty, members, lens, num_items, items, query_starts,
                    query_lens, kv, M, q_stride, q_head, qk_scale, max_splits, NUM_KV, GROUP,
                    QUERIES, CAPACITY, DH, BLOCK_DH, TILE, SPLIT, STAGES, PDL,
                )),
                (_produce, (
                    k_desc, v_desc, k_smem, v_smem, k_full, v_full, k_empty, v_empty, members, lens,
                    num_items, items, table_rows, pages_ptr, max_pages, kv * kv_head, CAPACITY, DH,
                    TILE, SPLIT, BOX, COLUMNS, STAGES, PAGE, AHEAD,
                )),
            ],
            [4, 4],
            [240, 24],
        )  # fmt: skip


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    decode: Any,
    table: Tensor,
    page_size: int,
    qk_scale: float,
    rows: int,
    max_splits: int,
    reads_ahead: bool,
) -> None:
    """Fill the parts (max, sum, accumulator) of what a DecodeEntries' entries share.

    rows: query rows of a task, 64 or 128; reads_ahead: see AttentionKind. An SM has one program.
    """
    num_kv, head_dim, prefixes = k.shape[1], k.shape[2], decode.prefixes
    part_max, part_sum, part_acc = parts
    box, programs = box_rows(page_size), max(1, num_sms(q.device) // num_kv)
    _hopper_prefix_kernel[(num_kv, min(prefixes.most_items, programs))](
        q_ptr=q, k_desc=descriptor(k, box), v_desc=descriptor(v, box), max_ptr=part_max,
        sum_ptr=part_sum, acc_ptr=part_acc, members=prefixes.members, lens=prefixes.lens,
        num_items=prefixes.num_items, items=prefixes.items, query_starts=decode.query_starts,
        query_lens=decode.query_lens, table_rows=decode.table_rows, pages_ptr=table,
        max_pages=table.stride(0), q_stride=q.stride(0), q_head=q.stride(1), kv_head=k.stride(1),
        qk_scale=qk_scale, max_splits=max_splits, NUM_KV=num_kv, GROUP=q.shape[1] // num_kv,
        QUERIES=decode.max_queries, CAPACITY=prefixes.members.shape[1], DH=head_dim,
        BLOCK_DH=part_acc.shape[1], WARPGROUPS=rows // WARPGROUP_ROWS, TILE=GPU_KV_TILE,
        SPLIT=GPU_KV_SPLIT, BOX=box, COLUMNS=COLUMNS, STAGES=_STAGES, PAGE=page_size, PDL=True,
        AHEAD=reads_ahead, num_warps=4, enable_fp_fusion=False, launch_pdl=True,
    )  # fmt: skip
