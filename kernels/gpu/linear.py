"""linear on the GPU: one chain of k16 tensor-core products in ascending k, fp32, one rounding.

Implementations of equal bits: cuBLASLt without split-K, a Triton kernel that streams weights past
few rows (skinny.py), and a Triton kernel for any shape and alignment. kernels/gpu/tuning.py knows
which is the fastest. Products are taken at a finite set of row counts (row_pieces).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from samebit.kernels.contract import tree_sum
from samebit.kernels.gpu import cublaslt, skinny
from samebit.kernels.gpu.swiglu import swiglu
from samebit.kernels.gpu.tuning import Key, choose, row_bucket

MAX_ROWS = 8192
_EXACT_ROWS = 256
_ROW_STEP = 128

# Weight shapes (N, K) for which the self-check found cuBLASLt unequal to Triton here.
_triton_shapes: set[tuple[int, int]] = set()


def use_triton(shapes: set[tuple[int, int]]) -> None:
    """Compute products with these weight shapes (N, K) by the Triton kernel from now on."""
    _triton_shapes.update(shapes)


@triton.jit
def _matmul_kernel(
    x_ptr, w_ptr, y_ptr, M, N, K, x_stride, w_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    num_m = tl.cdiv(M, BLOCK_M)
    rows = (pid % num_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (pid // num_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + columns.to(tl.int64)[None, :] * w_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + inner
        x = tl.load(x_rows + k[None, :], mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_rows + k[:, None], mask=(columns < N)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc)
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=inside)


def linear_triton(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """y [M, N] = x [M, K] @ weight [N, K].T; any shape, bf16; rows of both may lie apart."""
    (m, k), n = x.shape, weight.shape[0]
    block_m = 16 if m <= 16 else 64 if m <= 512 else 128
    block_n = 64 if m <= 512 else 128
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    _matmul_kernel[grid](
        x_ptr=x, w_ptr=weight, y_ptr=y, M=m, N=n, K=k, x_stride=x.stride(0),
        w_stride=weight.stride(0), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64,
        num_warps=4 if m <= 512 else 8, num_stages=3,
    )  # fmt: skip


def row_pieces(num_rows: int) -> list[tuple[int, int]]:
    """(start, length) of products over num_rows rows, every length from the finite set."""
    pieces = []
    start = 0
    while start < num_rows:
        left = num_rows - start
        length = left if left <= _EXACT_ROWS else min(left // _ROW_STEP * _ROW_STEP, MAX_ROWS)
        pieces.append((start, length))
        start += length
    return pieces


def product(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """y = x @ weight.T for a row count of the finite set, by the fastest implementation."""
    if tuple(weight.shape) in _triton_shapes or not cublaslt.supports(x, weight, y.dtype):
        return linear_triton(x, weight, y)
    (n, k), rows = weight.shape, row_bucket(len(x))
    choice = choose(x.device.index, Key(n, k, rows, fp32=y.dtype == torch.float32))
    if choice.tile is not None and x.is_contiguous() and weight.is_contiguous():
        return skinny.matmul(x, weight, y, choice.tile)
    return cublaslt.matmul(x, weight, y, choice.cublaslt)


def _checked(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        raise ValueError(f"linear on the GPU takes torch.bfloat16, got {x.dtype}, {weight.dtype}")
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
    return x, weight


def linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed -> [M, N] in out_dtype (default: x's).

    M and N may be 0: a rank may hold no row of the vocabulary.
    """
    x, weight = _checked(x, weight)
    if not len(weight):
        return torch.empty(len(x), 0, dtype=out_dtype or x.dtype, device=x.device)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype or x.dtype, device=x.device)
    for start, length in row_pieces(x.shape[0]):
        product(x[start : start + length], weight, y[start : start + length])
    return y


def linear_in_segments(x: Tensor, weight: Tensor, num_segments: int) -> Tensor:
    """The tree_sum of products over so many equal parts of K: [M, N] fp32.

    The tree's lowest sums are made by the products: an odd part's is added to the even one's.
    """
    if num_segments == 1 or not len(weight):
        return linear(x, weight, torch.float32)
    x, weight = _checked(x, weight)
    parts = list(zip(x.chunk(num_segments, 1), weight.chunk(num_segments, 1), strict=True))
    sums = []
    for even, odd in zip(parts[::2], parts[1::2], strict=True):
        y = linear(*even, torch.float32)
        a, b = odd
        if tuple(b.shape) in _triton_shapes or not cublaslt.supports(a, b, y.dtype):
            y += linear(a, b, torch.float32)
        else:
            for start, length in row_pieces(len(a)):
                rows = slice(start, start + length)
                cublaslt.matmul(a[rows], b, y[rows], accumulate=True)
        sums.append(y)
    return tree_sum(sums)


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The swiglu of x [M, K] times weight [2F, K] transposed -> [M, F]."""
    x, weight = _checked(x, weight)
    (rows, k), f = x.shape, weight.shape[0] // 2
    gapless = x.is_contiguous() and weight.is_contiguous()
    if 0 < rows <= skinny.MAX_ROWS and gapless and tuple(weight.shape) not in _triton_shapes:
        tile = choose(x.device.index, Key(f, k, row_bucket(rows), gated=True)).tile
        if tile is not None:
            y = torch.empty(rows, f, dtype=x.dtype, device=x.device)
            skinny.matmul(x, weight, y, tile, gated=True)
            return y
    return swiglu(linear(x, weight))
