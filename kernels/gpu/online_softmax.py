"""The online softmax that every attention kernel shares: one split, and the merge of splits.

Source: Milakov and Gimelshein 2018, arXiv 1805.02867. exp2 (ex2.approx), explicit fma, fusion off.
P is rounded to bf16 and its row sum goes through the tensor core, because a plain row sum depends
on the tile's height.
"""

import triton
import triton.language as tl


@triton.jit
def split_pass(
    q, k_ptr, v_ptr, pages, key_start, position, lo, hi, stride, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, PAGED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [lo, hi) of one split: running max, sum and accumulator."""
    d = tl.arange(0, BLOCK_D)
    ones = tl.full((TILE, 16), 1.0, tl.bfloat16)
    if PAGED and TILE <= 2 * PAGE and 2 * PAGE <= SPLIT and TILE % PAGE == 0:
        # All page ids at once, so that the tiles' loads depend on nothing in the loop.
        place = tl.arange(0, SPLIT // PAGE)
        ids = tl.load(pages + lo // PAGE + place, mask=lo + place * PAGE < hi, other=0)
    m = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for n0 in range(lo, hi, TILE):
        n = n0 + tl.arange(0, TILE)
        live = n < hi
        if PAGED:
            if TILE <= 2 * PAGE and 2 * PAGE <= SPLIT and TILE % PAGE == 0:
                first = (n0 - lo) // PAGE
                page = tl.sum(tl.where(place == first, ids, 0), 0)
                if TILE > PAGE:
                    second = tl.sum(tl.where(place == first + 1, ids, 0), 0)
                    page = tl.where(n < n0 + PAGE, page, second)
            else:
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
def merge(m, total, acc, next_m, next_total, next_acc):
    new_m = tl.maximum(m, next_m)
    a, b = tl.exp2(m - new_m), tl.exp2(next_m - new_m)
    total = tl.fma(total, a, next_total * b)
    return new_m, total, tl.fma(acc, a[:, None], next_acc * b[:, None])
