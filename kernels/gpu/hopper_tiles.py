"""The online softmax on Hopper: tiles come by TMA, warpgroups of 64 query rows compute.

The same operations in the same order as split_pass (online_softmax.py), so the same bits: what
differs is when they run. Some warps load tiles of keys and values ahead; a warpgroup's tensor cores
multiply one tile's weights and values and the next tile's scores while it exponentiates. Source of
the schedule: Shah et al. 2024, arXiv 2407.08608.
"""

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

from samebit.kernels.contract import GPU_KV_TILE
from samebit.kernels.gpu.card import generation

WARPGROUP_ROWS = 64
COLUMNS = 64
"""Of bf16, in the 128 bytes that shared memory is swizzled by."""
_LOWEST = gl.constexpr(-1e30)
_SWIZZLED = gl.NVMMASharedLayout(128, 16)


def takes(k: Tensor, v: Tensor, page_size: int | None) -> bool:
    """Whether tiles of keys and values [kv_slots, Hkv, Dh] come by TMA; page_size: None if packed.

    Both have the same strides.
    """
    whole_boxes = page_size is None or GPU_KV_TILE % page_size == 0 or page_size % GPU_KV_TILE == 0
    boxes = whole_boxes and (page_size is None or page_size >= 16)
    starts = k.data_ptr() % 16 == v.data_ptr() % 16 == 0
    aligned = starts and k.stride(0) % 8 == 0 and k.stride(1) % 8 == 0
    able = generation(k.device) == 9 and k.shape[2] in (64, 128)
    return able and boxes and aligned


def box_rows(page_size: int | None) -> int:
    """Keys that one copy brings: those of a page, or a tile of packed ones."""
    return GPU_KV_TILE if page_size is None else min(page_size, GPU_KV_TILE)


def descriptor(x: Tensor, box: int) -> TensorDescriptor:
    """Boxes of so many rows of one head of x [kv_slots, Hkv, Dh]."""
    slots, heads, head_dim = x.shape
    return TensorDescriptor(
        x,
        [slots, (heads - 1) * x.stride(1) + head_dim],
        [x.stride(0), 1],
        [box, COLUMNS],
        _SWIZZLED,
    )


@gluon.jit
def after_previous(START_NEXT: gl.constexpr):
    """Wait for the preceding kernel's results; let the following kernel start: see pdl.py."""
    if START_NEXT:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def turn_of(number, STAGES: gl.constexpr):
    """(stage, phase of its barriers) of a tile by its number."""
    return number % STAGES, number // STAGES & 1


@gluon.jit
def row_of(pages_ptr, key_start, n, hi, PAGED: gl.constexpr, PAGE: gl.constexpr):
    """Rows of keys n in the cache or the packed keys; some row where n is beyond hi."""
    if PAGED:
        page = gl.load(pages_ptr + n // PAGE, mask=n < hi, other=0)
        row = page * PAGE + n % PAGE
    else:
        row = key_start + n
    return row


@gluon.jit
def tile_rows(pages_ptr, key_start, n0, hi, TILE: gl.constexpr, BOX: gl.constexpr,
              PAGED: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """First rows of the boxes of the tile [n0, n0 + TILE): a tuple, all pages asked for at once."""
    rows = ()
    for box in gl.static_range(TILE // BOX):
        row = row_of(pages_ptr, key_start, n0 + box * BOX, hi, PAGED, PAGE)
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@gluon.jit
def load_tile(desc, column, smem, bar, rows, BOX: gl.constexpr, COLUMNS: gl.constexpr):
    """Have a tile's boxes, from these rows on, come to shared memory; the barrier tells when."""
    TILE: gl.constexpr = smem.shape[0]
    DH: gl.constexpr = smem.shape[1]
    mbarrier.expect(bar, TILE * DH * 2)
    for box in gl.static_range(TILE // BOX):
        for part in gl.static_range(DH // COLUMNS):
            place = smem.slice(box * BOX, BOX, dim=0).slice(part * COLUMNS, COLUMNS, dim=1)
            tma.async_copy_global_to_shared(desc, [rows[box], column + part * COLUMNS], bar, place)


@gluon.jit
def give_back(empty):
    """Let a tile's memory be written again, now that no thread of the warpgroup reads it."""
    gl.thread_barrier()  # one thread arrives for all
    mbarrier.arrive(empty, count=1)


@gluon.jit
def make_barriers(STAGES: gl.constexpr, READERS: gl.constexpr, RINGS: gl.constexpr = 1):
    """(full, empty) of each stage: filled by one copy, read by so many warpgroups.

    RINGS: so many full ones, ring after ring, where each tile is for a single ring's warpgroup. A
    barrier tells only whether an even or an odd number of copies has come: whoever waits at one has
    to wait for all of them.
    """
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [RINGS * STAGES, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for stage in gl.static_range(RINGS * STAGES):
        mbarrier.init(full.index(stage), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=READERS)
    fence_async_shared()
    return full, empty


@gluon.jit
def make_ones(TILE: gl.constexpr):
    """[TILE, 8] ones in shared memory: a product with them sums up rows."""
    filled: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    ones = gl.allocate_shared_memory(gl.bfloat16, [8, TILE], gl.NVMMASharedLayout(128, 16))
    ones.store(gl.full((8, TILE), 1.0, gl.bfloat16, filled))
    fence_async_shared()
    return ones.permute((1, 0))


@gluon.jit
def _weights(
    scores, m, position, n0, whole, qk_scale, mma: gl.constexpr, TILE: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """(weights in fp32, the new maximum, what earlier sums are scaled by) of a tile of scores."""
    s = scores * qk_scale
    if MASKED:  # noqa: SIM102 - a constant
        if n0 + TILE > whole:
            n = n0 + gl.arange(0, TILE, layout=gl.SliceLayout(0, mma))
            s = gl.where(n[None, :] <= position[:, None], s, float("-inf"))
    new_m = gl.maximum(m, gl.max(s, 1))
    rescale = gl.exp2(m - new_m)
    return gl.exp2(s - new_m[:, None]), new_m, rescale


@gluon.jit
def merge(m, total, next_m, next_total):
    """(max, sum, factor of the earlier part, of the later one): as merge in online_softmax.py."""
    new_m = gl.maximum(m, next_m)
    a, b = gl.exp2(m - new_m), gl.exp2(next_m - new_m)
    return new_m, gl.fma(total, a, next_total * b), a, b


@gluon.jit
def attend_tiles(
    q_smem, k_smem, v_smem, ones, main_smem, k_full, v_full, k_empty, v_empty, turn, lo, hi,
    position, whole, qk_scale, DH: gl.constexpr, TILE: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr, ONE_SPLIT: gl.constexpr,
):  # fmt: skip
    """(max, sum, accumulator [64, DH]) of a warpgroup's queries over the keys [lo, hi).

    The loading warps bring their tiles; turn: number of the first among all that they bring. lo is
    a split's start. MASKED: a query sees the keys up to its position, all of them those below
    `whole`. Without ONE_SPLIT splits are merged in order, kept in main_smem meanwhile.
    """
    M: gl.constexpr = 64
    smma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    omma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH, 16])
    tmma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, omma, 2)
    srow: gl.constexpr = gl.SliceLayout(1, smma)
    orow: gl.constexpr = gl.SliceLayout(1, omma)
    m = gl.full((M,), _LOWEST, gl.float32, srow)
    total = gl.zeros((M,), gl.float32, orow)
    acc = gl.zeros((M, DH), gl.float32, omma)
    none = gl.zeros((M, TILE), gl.float32, smma)
    no_sum = gl.zeros((M, 8), gl.float32, tmma)
    main_m, main_total = gl.convert_layout(m, orow), total

    before, its_phase = turn_of(turn, STAGES)
    mbarrier.wait(k_full.index(before), its_phase)
    scores = warpgroup_mma(q_smem, k_smem.index(before).permute((1, 0)), none, use_acc=False)
    give_back(k_empty.index(before))
    p, m, rescale = _weights(scores, m, position, lo, whole, qk_scale, smma, TILE, MASKED)
    p = gl.convert_layout(p.to(gl.bfloat16), weights)
    for n0 in range(lo + TILE, hi, TILE):
        number = turn + (n0 - lo) // TILE
        stage, phase = turn_of(number, STAGES)
        before, its_phase = turn_of(number - 1, STAGES)
        mbarrier.wait(k_full.index(stage), phase)
        scores = warpgroup_mma(
            q_smem, k_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(before), its_phase)
        acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
        row_sum = warpgroup_mma(p, ones, no_sum, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(2, deps=[scores])
        give_back(k_empty.index(stage))
        old_m = m
        if not ONE_SPLIT:
            m = gl.where(n0 % SPLIT == 0, gl.full((M,), _LOWEST, gl.float32, srow), m)
        next_p, m, next_rescale = _weights(
            scores, m, position, n0, whole, qk_scale, smma, TILE, MASKED
        )
        acc, row_sum, p = warpgroup_mma_wait(0, deps=[acc, row_sum, p])
        give_back(v_empty.index(before))
        row_sum = gl.convert_layout(gl.max(row_sum, 1), orow)
        total = gl.fma(total, gl.convert_layout(rescale, orow), row_sum)
        if not ONE_SPLIT:  # noqa: SIM102 - a constant
            if n0 % SPLIT == 0:  # the split before is complete
                if n0 == SPLIT:
                    main_m, main_total = gl.convert_layout(old_m, orow), total
                    main_smem.store(acc)
                else:
                    main = main_smem.load(omma)
                    main_m, main_total, a, b = merge(
                        main_m, main_total, gl.convert_layout(old_m, orow), total
                    )
                    main_smem.store(gl.fma(main, a[:, None], acc * b[:, None]))
                total = gl.zeros((M,), gl.float32, orow)
                acc = gl.zeros((M, DH), gl.float32, omma)
        rescale = next_rescale
        acc = acc * gl.convert_layout(rescale, orow)[:, None]
        p = gl.convert_layout(next_p.to(gl.bfloat16), weights)
    before, its_phase = turn_of(turn + (hi - 1 - lo) // TILE, STAGES)
    mbarrier.wait(v_full.index(before), its_phase)
    acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
    row_sum = warpgroup_mma(p, ones, no_sum, use_acc=False, is_async=True)
    acc, row_sum, p = warpgroup_mma_wait(0, deps=[acc, row_sum, p])
    give_back(v_empty.index(before))
    row_sum = gl.convert_layout(gl.max(row_sum, 1), orow)
    total = gl.fma(total, gl.convert_layout(rescale, orow), row_sum)
    m = gl.convert_layout(m, orow)
    if not ONE_SPLIT:  # noqa: SIM102 - a constant
        if hi > SPLIT:
            main = main_smem.load(omma)
            m, total, a, b = merge(main_m, main_total, m, total)
            acc = gl.fma(main, a[:, None], acc * b[:, None])
    return m, total, acc
