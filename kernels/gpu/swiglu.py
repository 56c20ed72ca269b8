"""swiglu on the GPU, and its gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


@triton.jit
def _swiglu_kernel(x_ptr, y_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(x_ptr + row * 2 * F + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + columns, mask=inside, other=0.0).to(tl.float32)
    silu = libdevice.div_rn(gate, 1.0 + tl.exp(-gate))
    tl.store(y_ptr + row * F + columns, (silu * up).to(y_ptr.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F] -> [..., F]."""
    flat = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
    width = flat.shape[1] // 2
    y = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(width))
    if flat.shape[0]:
        _swiglu_kernel[(flat.shape[0], triton.cdiv(width, block))](
            x_ptr=flat, y_ptr=y, F=width, BLOCK=block, num_warps=4, enable_fp_fusion=False
        )
    return y


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


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """grad [..., F], gate_up [..., 2F] -> gradient of gate_up, in fp32 and rounded once."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    grad_x = torch.empty_like(gate_up)
    rows, block = gate_up.numel() // (2 * width), min(1024, triton.next_power_of_2(width))
    if rows:
        _swiglu_backward_kernel[(rows, triton.cdiv(width, block))](
            grad_ptr=grad.contiguous(), x_ptr=gate_up, grad_x_ptr=grad_x, F=width, BLOCK=block,
            num_warps=4,
        )  # fmt: skip
    return grad_x
