"""linear on the CPU: fp32 products over rows filled up to blocks of 16.

Two implementations give the same bits: one product over all padded rows (fast), or one product per
block of 16 rows. `selfcheck` proves it for a model's shapes and falls back to the second.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from samebit.kernels.contract import CPU_ROW_BLOCK, tree_sum

# Weight shapes (N, K) for which the self-check found the one-product path unequal on this machine.
_blocked_shapes: set[tuple[int, int]] = set()


def use_blocked(shapes: set[tuple[int, int]]) -> None:
    """Compute products with these weight shapes (N, K) block by block from now on."""
    _blocked_shapes.update(shapes)


def linear_padded(x: Tensor, weight: Tensor) -> Tensor:
    """One product over x [M, K] padded to a multiple of 16 rows, with weight [N, K] -> [M, N]."""
    num_rows = x.shape[0]
    pad = -num_rows % CPU_ROW_BLOCK
    if pad:
        x = F.pad(x, (0, 0, 0, pad))
    return torch.mm(x, weight.t())[:num_rows]


def linear_blocked(x: Tensor, weight: Tensor) -> Tensor:
    """One product per block of 16 rows of x [M, K]: it is row-invariant by construction."""
    return torch.cat([linear_padded(rows, weight) for rows in x.split(CPU_ROW_BLOCK)])


def linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed -> [M, N] fp32, whatever out_dtype."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    if tuple(weight.shape) in _blocked_shapes:
        return linear_blocked(x, weight)
    return linear_padded(x, weight)


def linear_in_segments(x: Tensor, weight: Tensor, num_segments: int) -> Tensor:
    """The tree_sum of products over so many equal parts of K: [M, N] fp32."""
    parts = zip(x.chunk(num_segments, 1), weight.chunk(num_segments, 1), strict=True)
    return tree_sum([linear(a, b) for a, b in parts])
