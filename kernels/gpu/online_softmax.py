"""The online softmax that every attention kernel shares: one split, and the merge of splits.

Exponentials are exp2 (ex2.approx), multiply-adds are written out (fma), and fusion is off. P is
rounded to bf16 and its row sum goes through the tensor core, because a plain row sum depends on the
tile's height. Source: Milakov and Gimelshein 2018, arXiv 1805.02867.
"""

import torch
import triton
import triton.language as tl

from samebit.kernels.contract import GPU_KV_TILE
from samebit.kernels.gpu.card import generation, shared_memory


def num_stages(rows: int, block_dh: int, device: torch.device, most: int) -> int:
    """Stages of `split_pass` for so many queries: as many as shared memory holds, at most `most`.

    A product of fewer rows, or on an older card, takes its keys from registers: one stage more.
    """
    tile_bytes = 2 * GPU_KV_TILE * block_dh * torch.bfloat16.itemsize
    rest = rows * (block_dh + GPU_KV_TILE) * torch.bfloat16.itemsize  # queries and weights
    held = (shared_memory(device) - rest) // tile_bytes
    return max(1, min(most, held if rows >= 64 and generation(device) in (9, 10) else held + 1))


@triton.jit
def _attend_tile(
    q, k_ptr, v_ptr, pages, ids, key_start, position, n0, lo, hi, stride, qk_scale, ones, m, total,
    acc, DH: tl.constexpr, BLOCK_DH: tl.constexpr, TILE: tl.constexpr, PAGED: tl.constexpr,
    PAGE: tl.constexpr, IDS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys [n0, n0 + TILE). MASKED: some may not be seen."""
    d = tl.arange(0, BLOCK_DH)
    n = n0 + tl.arange(0, TILE)
    if PAGED:
        if IDS > 0:
            place = tl.arange(0, IDS)
            first = (n0 - lo) // PAGE
            page = tl.sum(tl.where(place == first, ids, 0), 0)
            if TILE > PAGE:
                second = tl.sum(tl.where(place == first + 1, ids, 0), 0)
                page = tl.where(n < n0 + PAGE, page, second)
        else:
            page = tl.load(pages + n // PAGE, mask=n < hi, other=0)
        row = page.to(tl.int64) * PAGE + n % PAGE
    else:
        row = (key_start + n).to(tl.int64)
    place_of = row[:, None] * stride + d[None, :]
    if MASKED:
        inside = (n < hi)[:, None] & (d < DH)[None, :]
        k = tl.load(k_ptr + place_of, mask=inside, other=0.0)
        seen = (n < hi)[None, :] & (n[None, :] <= position[:, None])
        s = tl.where(seen, tl.dot(q, tl.trans(k)) * qk_scale, -1e30)
    else:
        if BLOCK_DH > DH:
            k = tl.load(k_ptr + place_of, mask=(d < DH)[None, :], other=0.0)
        else:
            k = tl.load(k_ptr + place_of)
        s = tl.dot(q, tl.trans(k)) * qk_scale
    new_m = tl.maximum(m, tl.max(s, 1))
    rescale = tl.exp2(m - new_m)
    p = tl.exp2(s - new_m[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
        v = tl.load(v_ptr + place_of, mask=inside, other=0.0)
    elif BLOCK_DH > DH:
        v = tl.load(v_ptr + place_of, mask=(d < DH)[None, :], other=0.0)
    else:
        v = tl.load(v_ptr + place_of)
    p = p.to(tl.bfloat16)
    total = tl.fma(total, rescale, tl.max(tl.dot(p, ones), 1))
    acc = tl.dot(p, v, acc * rescale[:, None])
    return new_m, total, acc


@triton.jit
def nothing_seen(ROWS: tl.constexpr, BLOCK_DH: tl.constexpr):
    """The (max, sum, accumulator) that a split begins with."""
    m = tl.full((ROWS,), -1e30, tl.float32)
    return m, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, BLOCK_DH), tl.float32)


@triton.jit
def split_pass(
    q, k_ptr, v_ptr, pages, key_start, position, lo, whole, hi, stride, qk_scale, m, total, acc,
    DH: tl.constexpr, BLOCK_DH: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    PAGED: tl.constexpr, PAGE: tl.constexpr, UNMASKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [lo, hi) of one split, from (max, sum, accumulator) on.

    lo: the split's start, or where another kernel has stopped: whole tiles from its start. Every
    query sees the keys below `whole`; UNMASKED: tiles up to there have a loop without masks, and
    without MASKED there are no others.
    """
    ones = tl.full((TILE, 16), 1.0, tl.bfloat16)
    ids = 0
    IDS: tl.constexpr = (
        SPLIT // PAGE
        if PAGED and TILE <= 2 * PAGE and 2 * PAGE <= SPLIT and TILE % PAGE == 0
        else 0
    )
    if IDS > 0:  # all page ids at once, so that the tiles' loads depend on nothing in the loop
        place = tl.arange(0, IDS)
        ids = tl.load(pages + lo // PAGE + place, mask=lo + place * PAGE < hi, other=0)
    begin = lo
    if UNMASKED:
        begin += tl.maximum(tl.minimum(whole, hi) - lo, 0) // TILE * TILE
        for n0 in range(lo, begin, TILE):
            m, total, acc = _attend_tile(
                q, k_ptr, v_ptr, pages, ids, key_start, position, n0, lo, hi, stride, qk_scale,
                ones, m, total, acc, DH=DH, BLOCK_DH=BLOCK_DH, TILE=TILE, PAGED=PAGED, PAGE=PAGE,
                IDS=IDS, MASKED=False,
            )  # fmt: skip
    if MASKED:
        for n0 in range(begin, hi, TILE):
            m, total, acc = _attend_tile(
                q, k_ptr, v_ptr, pages, ids, key_start, position, n0, lo, hi, stride, qk_scale,
                ones, m, total, acc, DH=DH, BLOCK_DH=BLOCK_DH, TILE=TILE, PAGED=PAGED, PAGE=PAGE,
                IDS=IDS, MASKED=True,
            )  # fmt: skip
    return m, total, acc


@triton.jit
def merge(m, total, acc, next_m, next_total, next_acc):
    """The (max, sum, accumulator) of two runs of keys, the earlier one first."""
    new_m = tl.maximum(m, next_m)
    a, b = tl.exp2(m - new_m), tl.exp2(next_m - new_m)
    total = tl.fma(total, a, next_total * b)
    return new_m, total, tl.fma(acc, a[:, None], next_acc * b[:, None])
