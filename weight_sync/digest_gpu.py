"""weights_digest on the GPU: one pass over the weights, at the memory's speed."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["key", "first_row", "width", "first_column"])
def _hash_kernel(
    bits_ptr, total_ptr, key, step, bits_factor, first_row, width, first_column, row_stride,
    num_elements, columns, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_elements
    row, column = i // columns, i % columns
    bits = tl.load(bits_ptr + row * row_stride + column, mask=inside, other=0).to(tl.int64) & MASK
    position = (row + first_row) * width + first_column + column
    mixed = _mix(((position * step + key) ^ (bits * bits_factor)).to(tl.uint64))
    # Integers modulo 2^64: any order of the sum gives the same.
    tl.atomic_add(total_ptr, tl.sum(tl.where(inside, mixed.to(tl.int64), 0), 0))


def add_hash(
    bits: Tensor,
    total: Tensor,
    key: int,
    step: int,
    bits_factor: int,
    first_row: int,
    width: int,
    first_column: int,
) -> None:
    """Add the hash of rows [R, C] (int16 or int32 views, inner stride 1) to total, int64.

    key, step and bits_factor are 64-bit values as signed integers; see weight_sync.digest.
    """
    count = bits.numel()
    if count:
        mask = (1 << (8 * bits.element_size())) - 1
        _hash_kernel[(triton.cdiv(count, _BLOCK),)](
            bits_ptr=bits, total_ptr=total, key=key, step=step, bits_factor=bits_factor,
            first_row=first_row, width=width, first_column=first_column, row_stride=bits.stride(0),
            num_elements=count, columns=bits.shape[1], MASK=mask, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
