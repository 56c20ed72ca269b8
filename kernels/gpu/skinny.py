"""linear for few rows: kernels that stream the weights at the memory's speed.

The contract's chain in tiles of all rows by a few columns, so that even a narrow weight keeps every
SM busy. While the preceding kernel still runs, a tile's first weights are fetched into L2. The
gated form computes swiglu of the rounded gate and up products as well. Tiles cannot change a bit.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from samebit.kernels.gpu.pdl import after_previous, prefetch_l2, supported

MAX_ROWS = 128


@dataclass(frozen=True)
class Tile:
    """How one product is cut up. Weight rows N must be a multiple of columns, K of block_k."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = False  # weights as the tensor core's first operand
    tma: bool = False  # operands through tensor-map copies
    prefetch: int = 0  # elements of each weight row fetched ahead, a multiple of 64
    tail: int = 0  # columns of a second, smaller tile beside the first: 32 + 16 makes 48

    @property
    def columns(self) -> int:
        """Weight rows of one program."""
        return self.block_n + self.tail

    def divides(self, n: int, k: int) -> bool:
        """Whether a weight [n, k] is a whole number of these tiles."""
        return n % self.columns == 0 and k % self.block_k == 0


@triton.jit
def _weights(w_ptr, first, k0, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Tile [BLOCK_N, BLOCK_K] of the weight from row `first` and column k0 on."""
    if TMA:
        return w_ptr.load([first, k0])
    else:
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        return tl.load(w_ptr + n[:, None] * K + (k0 + tl.arange(0, BLOCK_K))[None, :])


@triton.jit
def _rows(x_ptr, k0, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Tile [BLOCK_M, BLOCK_K] of x from column k0 on, zeros below its last row."""
    if TMA:
        return x_ptr.load([0, k0])
    else:
        m = tl.arange(0, BLOCK_M)
        place = m.to(tl.int64)[:, None] * K + (k0 + tl.arange(0, BLOCK_K))[None, :]
        return tl.load(x_ptr + place, mask=(m < M)[:, None], other=0.0)


@triton.jit
def _product(x, w, acc, SWAP: tl.constexpr):
    if SWAP:
        return tl.dot(w, tl.trans(x), acc)
    else:
        return tl.dot(x, tl.trans(w), acc)


@triton.jit
def _swiglu(gate, up, dtype: tl.constexpr):
    """The swiglu of both products, rounded before."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    return libdevice.div_rn(gate, 1.0 + tl.exp(-gate)) * up


@triton.jit
def _store(y_ptr, acc, rows, columns, M, N, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.trans(acc)
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None])


@triton.jit(do_not_specialize=["M"])
def _skinny_kernel(
    x_ptr, w_ptr, tail_ptr, raw_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    GATED: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * (BLOCK_N + TAIL)
    rows = tl.arange(0, BLOCK_M)
    columns = first + tl.arange(0, BLOCK_N)
    if PREFETCH > 0:
        lines = raw_ptr + columns.to(tl.int64)[:, None] * K + (tl.arange(0, PREFETCH) * 64)[None, :]
        prefetch_l2(lines)
        if GATED:
            prefetch_l2(lines + N.to(tl.int64) * K)
        if TAIL:
            tail_lines = lines + tl.full((), BLOCK_N, tl.int64) * K
            prefetch_l2(tail_lines)
            if GATED:
                prefetch_l2(tail_lines + N.to(tl.int64) * K)
    after_previous(PDL)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_up = acc
    if TAIL:
        acc_tail = tl.zeros((BLOCK_M, TAIL), dtype=tl.float32)
        acc_tail_up = acc_tail
    for k0 in range(0, K, BLOCK_K):
        x = _rows(x_ptr, k0, M, K, BLOCK_M, BLOCK_K, TMA)
        acc = _product(x, _weights(w_ptr, first, k0, K, BLOCK_N, BLOCK_K, TMA), acc, SWAP)
        if GATED:
            w = _weights(w_ptr, N + first, k0, K, BLOCK_N, BLOCK_K, TMA)
            acc_up = _product(x, w, acc_up, SWAP)
        if TAIL:
            w = _weights(tail_ptr, first + BLOCK_N, k0, K, TAIL, BLOCK_K, TMA)
            acc_tail = _product(x, w, acc_tail, False)
            if GATED:
                w = _weights(tail_ptr, N + first + BLOCK_N, k0, K, TAIL, BLOCK_K, TMA)
                acc_tail_up = _product(x, w, acc_tail_up, False)
    if GATED:
        acc = _swiglu(acc, acc_up, y_ptr.dtype.element_ty)
        if TAIL:
            acc_tail = _swiglu(acc_tail, acc_tail_up, y_ptr.dtype.element_ty)
    _store(y_ptr, acc, rows, columns, M, N, SWAP)
    if TAIL:
        _store(y_ptr, acc_tail, rows, first + BLOCK_N + tl.arange(0, TAIL), M, N, False)


def block_rows(num_rows: int) -> int:
    """Rows of a tile: all of them, as a power of two from 16 on."""
    return max(16, triton.next_power_of_2(num_rows))


def matmul(x: Tensor, weight: Tensor, y: Tensor, tile: Tile, *, gated: bool = False) -> None:
    """y [M, N] = x [M, K] @ weight [N, K].T, M up to 128; contiguous bf16 in, bf16 or fp32 out.

    gated: weight [2N, K] = [gate; up] and y = swiglu of the two rounded products.
    A tile with a tail is not swapped. Raises ValueError for a tile that does not divide the
    weight, since what is left over would not be written.
    """
    num_rows, k = x.shape
    n = y.shape[1]
    if not tile.divides(n, k):
        raise ValueError(
            f"tile takes {tile.columns} x {tile.block_k} of a weight {n} x {k}; it must divide both"
        )
    block_m = block_rows(num_rows)
    rows, first, tail = x, weight, weight
    if tile.tma:
        rows = TensorDescriptor(x, [num_rows, k], [k, 1], [block_m, tile.block_k])
        first, tail = (
            TensorDescriptor(weight, list(weight.shape), [k, 1], [height, tile.block_k])
            for height in (tile.block_n, tile.tail or tile.block_n)
        )
    pdl = supported(x.device)
    _skinny_kernel[(n // tile.columns,)](
        x_ptr=rows, w_ptr=first, tail_ptr=tail, raw_ptr=weight, y_ptr=y, M=num_rows, N=n, K=k,
        BLOCK_M=block_m, BLOCK_N=tile.block_n, TAIL=tile.tail, BLOCK_K=tile.block_k,
        SWAP=tile.swap, TMA=tile.tma, GATED=gated, PREFETCH=tile.prefetch // 64, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False, launch_pdl=pdl,
    )  # fmt: skip
