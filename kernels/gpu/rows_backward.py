"""Gradients of the row operations on the GPU: rms_norm, swiglu. In fp32, rounded once.

The weight's gradient of rms_norm is a sum over all rows: over fixed blocks of rows in order, then
over the blocks, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl

from samebit.kernels.gpu.rows import flat_rows

_NORM_ITERATIONS = 16  # tiles of rows that one program sums up


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
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad and x [..., D], weight [D], inverse_rms [..., 1] fp32 -> gradients of x and weight."""
    flat, width = flat_rows(x), x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    rows, warps = max(1, 2048 // block), 4 if block <= 1024 else 8
    programs = triton.cdiv(len(flat), rows * _NORM_ITERATIONS)
    partial = torch.empty(programs, width, device=x.device)
    if programs:
        _rms_norm_backward_kernel[(programs,)](
            grad.contiguous(), flat, weight, inverse_rms, grad_x, partial, len(flat),
            flat.stride(0), width, rows, block, _NORM_ITERATIONS, num_warps=warps,
        )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


@triton.jit
def _swiglu_backward_kernel(grad_ptr, x_ptr, grad_x_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    first = row * 2 * F + columns
    gate = tl.load(x_ptr + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + first + F, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    dtype = grad_x_ptr.dtype.element_ty
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(grad_x_ptr + first, grad_gate.to(dtype), mask=inside)
    tl.store(grad_x_ptr + first + F, (grad * silu).to(dtype), mask=inside)


def swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """grad [..., F], gate_up [..., 2F] -> gradient of gate_up."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    grad_x = torch.empty_like(gate_up)
    rows, block = gate_up.numel() // (2 * width), min(1024, triton.next_power_of_2(width))
    if rows:
        _swiglu_backward_kernel[(rows, triton.cdiv(width, block))](
            grad.contiguous(), gate_up, grad_x, width, block, num_warps=4
        )
    return grad_x
