"""What decode entries read for themselves, on Hopper: programs take (entry, KV head) in turn.

A loading warp brings the next items' tiles while two warpgroups compute, each every second item:
memory never waits for an item to begin or to end. An item's splits are computed one after another,
and merged with those that the entry shares, by the same warpgroup. See hopper_tiles.py and
decode_attention.py, whose portable kernel gives the same bits.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from samebit.kernels.contract import GPU_KV_SPLIT, GPU_KV_TILE
from samebit.kernels.gpu.card import num_sms
from samebit.kernels.gpu.hopper_tiles import (
    COLUMNS,
    after_previous,
    box_rows,
    descriptor,
    give_back,
    load_tile,
    make_barriers,
    merge,
    takes,
    turn_of,
)

_STAGES = 3
_OUTSIDE = gl.constexpr(1 << 30)  # a row that no cache has
_TAIL_ROWS = 16  # keys that one copy brings where a context ends
_ROWS = 16  # of queries, of an entry and a KV head
_MOST_SPLITS = 2  # that an entry reads for itself: one program computes all
_LEAST_ITEMS = 1.5  # of a multiprocessor, where an entry may have several splits


@gluon.jit
def _lens(context_lens, prefix_lens, entry, SHARED: gl.constexpr):
    """(keys, those that the entry shares) of an entry."""
    return gl.load(context_lens + entry), gl.load(prefix_lens + entry) if SHARED else 0


@gluon.jit
def _page_ids(pages, n0, context_len, TILE: gl.constexpr, PAGE: gl.constexpr):
    """Those of a tile, as a tuple: asked for all at once."""
    ids = ()
    for i in gl.static_range(max(1, TILE // PAGE)):
        n = n0 + i * PAGE
        page = gl.load(pages + n // PAGE, mask=n < context_len, other=0)
        ids = ids + (page,)  # type: ignore[assignment]  # noqa: RUF005
    return ids


@gluon.jit
def _rows(ids, n0, context_len, TILE: gl.constexpr, BOX: gl.constexpr, PAGE: gl.constexpr):
    """First rows of a tile's boxes, as a tuple; zeros come for boxes behind the context."""
    rows = ()
    for box in gl.static_range(TILE // BOX):
        n = n0 + box * BOX
        row = gl.where(n < context_len, ids[box * BOX // PAGE] * PAGE + n % PAGE, _OUTSIDE)
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@gluon.jit
def _produce(
    k_desc, v_desc, k_tail, v_tail, k_smem, v_smem, k_full, v_full, k_empty, v_empty, prefix_lens,
    query_lens, table_rows, context_lens, num_items, pages_ptr, max_pages, kv_head,
    NUM_KV: gl.constexpr, QUERIES: gl.constexpr, TILE: gl.constexpr, BOX: gl.constexpr,
    TAIL: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, PAGE: gl.constexpr,
    SHARED: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """The warp that loads."""
    turn, count = 0, 0
    if not AHEAD:
        after_previous(False)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        entry, column = item // NUM_KV, item % NUM_KV * kv_head
        context_len, shared = _lens(context_lens, prefix_lens, entry, SHARED)
        query_len = gl.load(query_lens + entry) if QUERIES > 1 else 1
        pages = pages_ptr + gl.load(table_rows + entry).to(gl.int64) * max_pages
        for n0 in range(shared, context_len, TILE):
            ids = _page_ids(pages, n0, context_len, TILE, PAGE)
            if n0 + TILE > context_len - query_len:  # with keys of this step
                after_previous(False)
            stage, phase = turn_of(turn, STAGES)
            k_tile, v_tile = k_smem.index(stage), v_smem.index(stage)
            place = count % 2 * STAGES + stage
            k_bar, v_bar = k_full.index(place), v_full.index(place)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            if n0 + TILE <= context_len:
                rows = _rows(ids, n0, context_len, TILE, BOX, PAGE)
                load_tile(k_desc, column, k_tile, k_bar, rows, BOX, COLUMNS)
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                load_tile(v_desc, column, v_tile, v_bar, rows, BOX, COLUMNS)
            else:
                tail_rows = _rows(ids, n0, context_len, TILE, TAIL, PAGE)
                load_tile(k_tail, column, k_tile, k_bar, tail_rows, TAIL, COLUMNS)
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                load_tile(v_tail, column, v_tile, v_bar, tail_rows, TAIL, COLUMNS)
            turn += 1
        if context_len > shared:
            count += 1


@gluon.jit
def _attend_tile(
    q, k_tile, v_tile, k_full, v_full, k_empty, v_empty, phase, n0, context_len, position, qk_scale,
    m, total, acc, TILE: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax: _attend_tile in online_softmax.py."""
    mma: gl.constexpr = acc.type.layout
    M: gl.constexpr = acc.shape[0]
    operand: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    ones = gl.full((TILE, 8), 1.0, gl.bfloat16, operand)
    no_sum, none = gl.zeros((M, 8), gl.float32, mma), gl.zeros((M, TILE), gl.float32, mma)
    mbarrier.wait(k_full, phase)
    k = k_tile.permute((1, 0)).load(operand)
    fence_async_shared()  # no copy overtakes loads on their way
    give_back(k_empty)
    n = n0 + gl.arange(0, TILE, layout=gl.SliceLayout(0, mma))
    seen = n[None, :] <= position[:, None]
    s = gl.where(seen, mma_v2(q, k, none) * qk_scale, -1e30)
    new_m = gl.maximum(m, gl.max(s, 1))
    rescale = gl.exp2(m - new_m)
    p = gl.where(seen, gl.exp2(s - new_m[:, None]), 0.0).to(gl.bfloat16)
    p = gl.convert_layout(p, gl.DotOperandLayout(0, mma, 2))
    total = gl.fma(total, rescale, gl.max(mma_v2(p, ones, no_sum), 1))
    mbarrier.wait(v_full, phase)
    v = v_tile.load(operand)
    fence_async_shared()
    give_back(v_empty)
    if n0 + TILE > context_len:  # what lies behind the context may be anything
        key = n0 + gl.arange(0, TILE, layout=gl.SliceLayout(1, operand))
        v = gl.where((key < context_len)[:, None], v, gl.zeros_like(v))
    return new_m, total, mma_v2(p, v, acc * rescale[:, None])


@gluon.jit
def _nothing_seen(M: gl.constexpr, DH: gl.constexpr, mma: gl.constexpr):
    """The (max, sum, accumulator) that a split begins with."""
    row: gl.constexpr = gl.SliceLayout(1, mma)
    m, total = gl.full((M,), -1e30, gl.float32, row), gl.zeros((M,), gl.float32, row)
    return m, total, gl.zeros((M, DH), gl.float32, mma)


@gluon.jit
def _load_part(max_ptr, sum_ptr, acc_ptr, place, d, mask, DH: gl.constexpr):
    """(max, sum, accumulator) as another thread wrote it; nothing seen where the mask is off."""
    m = gl.load(max_ptr + place, mask=mask, other=-1e30, cache_modifier=".cg")
    total = gl.load(sum_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
    acc = gl.load(
        acc_ptr + place[:, None] * DH + d[None, :], mask=mask[:, None], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip
    return m, total, acc


@gluon.jit
def _merge_parts(max_ptr, sum_ptr, acc_ptr, first, d, live, num_splits, OWN: gl.constexpr,
                 M: gl.constexpr, DH: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """The (max, sum, accumulator) of all splits, some asked for at a time; first: of split 0."""
    AT_ONCE: gl.constexpr = 4
    m, total, acc = _nothing_seen(M, DH, mma)
    for s0 in range(0, num_splits, AT_ONCE):
        parts = ()
        for i in gl.static_range(AT_ONCE):
            place, mask = first + (s0 + i) * OWN, live & (s0 + i < num_splits)
            part = _load_part(max_ptr, sum_ptr, acc_ptr, place, d, mask, DH)
            parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
        for i in gl.static_range(AT_ONCE):
            if s0 + i < num_splits:
                m, total, a, b = merge(m, total, parts[i][0], parts[i][1])
                acc = gl.fma(acc, a[:, None], parts[i][2] * b[:, None])
    return m, total, acc


@gluon.jit
def _load_queries(q_ptr, query_len, q_stride, q_head, GROUP: gl.constexpr, OWN: gl.constexpr,
                  DH: gl.constexpr, M: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """An entry's query rows of one KV head, [M, DH]; zeros where there are no more."""
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    r = gl.arange(0, M, layout=gl.SliceLayout(1, left))
    d = gl.arange(0, DH, layout=gl.SliceLayout(0, left))
    live = (r < OWN) & (r // GROUP < query_len)
    place = r // GROUP * q_stride + r % GROUP * q_head
    return gl.load(q_ptr + place[:, None] + d[None, :], mask=live[:, None], other=0.0)


@gluon.jit
def _attend_item(
    q_ptr, o_ptr, max_ptr, sum_ptr, acc_ptr, k_smem, v_smem, k_full, v_full, k_empty, v_empty, turn,
    phases, entry, kv, context_len, shared, query_starts, query_lens, q_stride, q_head, qk_scale,
    max_splits, WHICH: gl.constexpr, NUM_KV: gl.constexpr, GROUP: gl.constexpr,
    QUERIES: gl.constexpr, DH: gl.constexpr, M: gl.constexpr, TILE: gl.constexpr,
    SPLIT: gl.constexpr, STAGES: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """Write the output of an entry's query rows of one KV head; returns the phases after it."""
    OWN: gl.constexpr = GROUP * QUERIES  # rows of an entry
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    query_len = gl.load(query_lens + entry) if QUERIES > 1 else 1
    row0 = gl.load(query_starts + entry).to(gl.int64)
    q = _load_queries(
        q_ptr + row0 * q_stride + kv * GROUP * q_head, query_len, q_stride, q_head, GROUP, OWN, DH,
        M, mma,
    )  # fmt: skip
    r = gl.arange(0, M, layout=gl.SliceLayout(1, mma))
    d = gl.arange(0, DH, layout=gl.SliceLayout(0, mma))
    live = (r < OWN) & (r // GROUP < query_len)
    position = context_len - query_len + gl.minimum(r // GROUP, query_len - 1)
    num_splits = gl.cdiv(context_len, SPLIT)
    parts = (entry.to(gl.int64) * NUM_KV + kv) * max_splits
    m, total, acc = _nothing_seen(M, DH, mma)
    for split in range(shared // SPLIT, num_splits):
        lo, hi = gl.maximum(split * SPLIT, shared), gl.minimum(split * SPLIT + SPLIT, context_len)
        place = (parts + split) * OWN + r
        m, total, acc = _nothing_seen(M, DH, mma)
        if SHARED:
            carried = live & (split * SPLIT < shared)
            m, total, acc = _load_part(max_ptr, sum_ptr, acc_ptr, place, d, carried, DH)
        for n0 in range(lo, hi, TILE):
            stage = (turn + (n0 - shared) // TILE) % STAGES
            full = WHICH * STAGES + stage
            m, total, acc = _attend_tile(
                q, k_smem.index(stage), v_smem.index(stage), k_full.index(full),
                v_full.index(full), k_empty.index(stage), v_empty.index(stage), phases >> stage & 1,
                n0, context_len, position, qk_scale, m, total, acc, TILE,
            )  # fmt: skip
            phases ^= 1 << stage
        if num_splits > 1:
            gl.store(max_ptr + place, m, mask=live)
            gl.store(sum_ptr + place, total, mask=live)
            gl.store(acc_ptr + place[:, None] * DH + d[None, :], acc, mask=live[:, None])
    if num_splits > 1:
        gl.thread_barrier()  # what another thread of the warpgroup wrote is read from here on
        m, total, acc = _merge_parts(
            max_ptr, sum_ptr, acc_ptr, parts * OWN + r, d, live, num_splits, OWN, M, DH, mma
        )
    row = (row0 + r // GROUP) * NUM_KV * GROUP + kv * GROUP + r % GROUP
    out = (acc / total[:, None]).to(gl.bfloat16)
    gl.store(o_ptr + row[:, None] * DH + d[None, :], out, mask=live[:, None])
    return phases


@gluon.jit
def _consume(
    q_ptr, o_ptr, max_ptr, sum_ptr, acc_ptr, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
    prefix_lens, query_starts, query_lens, context_lens, num_items, q_stride, q_head,
    qk_scale, max_splits, WHICH: gl.constexpr, NUM_KV: gl.constexpr, GROUP: gl.constexpr,
    QUERIES: gl.constexpr, DH: gl.constexpr, M: gl.constexpr, TILE: gl.constexpr,
    SPLIT: gl.constexpr, STAGES: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """A warpgroup that computes every second of a program's items.

    phases: a bit for each stage, of the next copy that is for this warpgroup.
    """
    turn, count, phases = 0, 0, 0
    after_previous(True)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        entry, kv = item // NUM_KV, item % NUM_KV
        context_len, shared = _lens(context_lens, prefix_lens, entry, SHARED)
        if context_len > shared:
            if count % 2 == WHICH:
                phases = _attend_item(
                    q_ptr, o_ptr, max_ptr, sum_ptr, acc_ptr, k_smem, v_smem, k_full, v_full,
                    k_empty, v_empty, turn, phases, entry, kv, context_len, shared, query_starts,
                    query_lens, q_stride, q_head, qk_scale, max_splits, WHICH, NUM_KV, GROUP,
                    QUERIES, DH, M, TILE, SPLIT, STAGES, SHARED,
                )  # fmt: skip
            count += 1
            turn += gl.cdiv(context_len - shared, TILE)


@gluon.jit(do_not_specialize=["max_pages", "max_splits", "num_items"])
def _hopper_decode_kernel(
    q_ptr, k_desc, v_desc, k_tail, v_tail, o_ptr, max_ptr, sum_ptr, acc_ptr, prefix_lens,
    query_starts, query_lens, table_rows, context_lens, pages_ptr, num_items, max_pages, q_stride,
    q_head, kv_head, qk_scale, max_splits, NUM_KV: gl.constexpr, GROUP: gl.constexpr,
    QUERIES: gl.constexpr, DH: gl.constexpr, M: gl.constexpr, TILE: gl.constexpr,
    SPLIT: gl.constexpr, BOX: gl.constexpr, TAIL: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, PAGE: gl.constexpr, SHARED: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """As _decode_kernel in decode_attention.py."""
    operand: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DH], operand)
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, DH], operand)
    k_full, k_empty = make_barriers(STAGES, 1, 2)
    v_full, v_empty = make_barriers(STAGES, 1, 2)
    gl.warp_specialize(
        [
            (_consume, (
                q_ptr, o_ptr, max_ptr, sum_ptr, acc_ptr, k_smem, v_smem, k_full, v_full, k_empty,
                v_empty, prefix_lens, query_starts, query_lens, context_lens, num_items, q_stride,
                q_head, qk_scale, max_splits, 0, NUM_KV, GROUP, QUERIES, DH, M, TILE, SPLIT, STAGES,
                SHARED,
            )),
            (_consume, (
                q_ptr, o_ptr, max_ptr, sum_ptr, acc_ptr, k_smem, v_smem, k_full, v_full, k_empty,
                v_empty, prefix_lens, query_starts, query_lens, context_lens, num_items, q_stride,
                q_head, qk_scale, max_splits, 1, NUM_KV, GROUP, QUERIES, DH, M, TILE, SPLIT, STAGES,
                SHARED,
            )),
            (_produce, (
                k_desc, v_desc, k_tail, v_tail, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
                prefix_lens, query_lens, table_rows, context_lens, num_items, pages_ptr, max_pages,
                kv_head, NUM_KV, QUERIES, TILE, BOX, TAIL, COLUMNS, STAGES, PAGE, SHARED, AHEAD,
            )),
        ],
        [4, 1],
        [216, 48],
    )  # fmt: skip


def fits(
    k: Tensor,
    v: Tensor,
    page_size: int,
    num_entries: int,
    entry_rows: int,
    own_splits: int,
    max_splits: int,
) -> bool:
    """Whether `own_attention` takes so many entries, and is faster than a program for each split.

    entry_rows: query rows of one, for a KV head; own_splits: those that one may read for itself,
    of max_splits in all.
    """
    if entry_rows > _ROWS or own_splits > _MOST_SPLITS or not takes(k, v, page_size):
        return False
    return max_splits == 1 or num_entries * k.shape[1] >= _LEAST_ITEMS * num_sms(k.device)


def own_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    decode: Any,
    table: Tensor,
    page_size: int,
    qk_scale: float,
    max_splits: int,
    reads_ahead: bool,
) -> None:
    """Write a DecodeEntries' rows of output; parts: (max, sum, accumulator) of what they share.

    Arguments as in decode_attention.decode_attention. An SM has one program.
    """
    num_kv, head_dim, prefixes = k.shape[1], k.shape[2], decode.prefixes
    (part_max, part_sum, part_acc), box = parts, box_rows(page_size)
    num_items, group = len(decode.table_rows) * num_kv, q.shape[1] // num_kv
    _hopper_decode_kernel[(min(num_sms(q.device), num_items),)](
        q_ptr=q, k_desc=descriptor(k, box), v_desc=descriptor(v, box),
        k_tail=descriptor(k, _TAIL_ROWS), v_tail=descriptor(v, _TAIL_ROWS), o_ptr=output,
        max_ptr=part_max, sum_ptr=part_sum, acc_ptr=part_acc,
        prefix_lens=decode.context_lens if prefixes is None else prefixes.of_entry,
        query_starts=decode.query_starts, query_lens=decode.query_lens,
        table_rows=decode.table_rows, context_lens=decode.context_lens, pages_ptr=table,
        num_items=num_items, max_pages=table.stride(0), q_stride=q.stride(0), q_head=q.stride(1),
        kv_head=k.stride(1), qk_scale=qk_scale, max_splits=max_splits, NUM_KV=num_kv, GROUP=group,
        QUERIES=decode.max_queries, DH=head_dim, M=_ROWS, TILE=GPU_KV_TILE, SPLIT=GPU_KV_SPLIT,
        BOX=box, TAIL=_TAIL_ROWS, COLUMNS=COLUMNS, STAGES=_STAGES, PAGE=page_size,
        SHARED=prefixes is not None, AHEAD=reads_ahead, num_warps=4, enable_fp_fusion=False,
        launch_pdl=True,
    )  # fmt: skip
