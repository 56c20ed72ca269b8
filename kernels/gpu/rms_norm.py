"""rms_norm on the GPU, with and without a residual sum before it, and its gradients.

Every program handles whole rows with a fixed block and fixed warps, so a row's sum has one tree.
The weight's gradient is summed over fixed blocks of rows in order, then over the blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from samebit.kernels.contract import GPU_NORM_ROWS
from samebit.kernels.gpu.pdl import after_previous, supported

_NORM_ITERATIONS = 16  # tiles of rows that one program sums up


def norm_launch(width: int) -> tuple[int, int, int]:
    """(block, rows, warps) of a program that normalises rows of `width`: they fix a sum's tree."""
    block = triton.next_power_of_2(width)
    return block, GPU_NORM_ROWS if block <= 256 else 1, 4 if block <= 4096 else 8


def _flat_rows(x: Tensor) -> Tensor:
    """[..., D] -> [rows, D], each row without gaps."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr, w_ptr, y_ptr, inverse_ptr, num_rows, stride, eps, D, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    mean = libdevice.div_rn(tl.sum(x * x, axis=1), D.to(tl.float32))
    inverse = libdevice.rsqrt(mean + eps)
    w = tl.load(w_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    y = x * inverse[:, None] * w[None, :]
    place = rows[:, None] * D + columns[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_ptr + rows, inverse, mask=rows < num_rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (normalised [..., D], inverse rms [..., 1] fp32)."""
    flat, width = _flat_rows(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block, rows, warps = norm_launch(width)
    _rms_norm_kernel[(triton.cdiv(flat.shape[0], rows),)](
        x_ptr=flat, w_ptr=weight, y_ptr=y, inverse_ptr=inverse, num_rows=flat.shape[0],
        stride=flat.stride(0), eps=eps, D=width, BLOCK=block, ROWS=rows,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return y, inverse.unsqueeze(-1)


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, w_ptr, y_ptr, total_ptr, num_rows, eps, D, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    place = rows[:, None] * D + columns[None, :]
    w = tl.load(w_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    after_previous(PDL)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    total = (residual + x).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + place, total, mask=inside)
    x = total.to(tl.float32)
    mean = libdevice.div_rn(tl.sum(x * x, axis=1), D.to(tl.float32))
    y = x * libdevice.rsqrt(mean + eps)[:, None] * w[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) for s = x + residual, both [T, D] contiguous bf16."""
    num_rows, width = x.shape
    y, total = torch.empty_like(x), torch.empty_like(x)
    block, rows, warps = norm_launch(width)
    pdl = supported(x.device)
    if num_rows:
        _add_rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
            x_ptr=x, residual_ptr=residual, w_ptr=weight, y_ptr=y, total_ptr=total,
            num_rows=num_rows, eps=eps, D=width, BLOCK=block, ROWS=rows, PDL=pdl,
            num_warps=warps, enable_fp_fusion=False, launch_pdl=pdl,
        )  # fmt: skip
    return y, total


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward_kernel(
    grad_ptr, x_ptr, w_ptr, inverse_ptr, grad_x_ptr, partial_ptr, num_rows, stride, D,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS * ITERATIONS
    for i in range(ITERATIONS):
        rows = first + i * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
        place = rows[:, None] * D + columns[None, :]
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
        inverse = tl.load(inverse_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        normed = x.to(tl.float32) * inverse
        total += grad * normed
        scaled = grad * w
        projection = tl.sum(scaled * normed, axis=1)[:, None] / D
        grad_x = (scaled - normed * projection) * inverse
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    place = partial_ptr + tl.program_id(0).to(tl.int64) * D + columns
    tl.store(place, tl.sum(total, axis=0), mask=columns < D)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """grad and x [..., D], weight [D], inverse_rms [..., 1] fp32 -> gradients of x and weight."""
    flat, width = _flat_rows(x), x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    rows, warps = max(1, 2048 // block), 4 if block <= 1024 else 8
    programs = triton.cdiv(len(flat), rows * _NORM_ITERATIONS)
    partial = torch.empty(programs, width, device=x.device)
    if programs:
        _rms_norm_backward_kernel[(programs,)](
            grad_ptr=grad.contiguous(), x_ptr=flat, w_ptr=weight, inverse_ptr=inverse_rms,
            grad_x_ptr=grad_x, partial_ptr=partial, num_rows=len(flat), stride=flat.stride(0),
            D=width, ROWS=rows, BLOCK=block, ITERATIONS=_NORM_ITERATIONS, num_warps=warps,
        )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)
