"""swiglu: silu(gate) * up in fp32 from the rounded products, one rounding.

Contract: silu(g) = g / (1 + exp(-g)). Source: Shazeer 2020, arXiv 2002.05202.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samebit.kernels.cpu import swiglu as cpu
from samebit.kernels.linear import linear
from samebit.kernels.op import Op, applied


def swiglu_ref(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F] = [gate; up] -> [..., F] in plain torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


_forward = Op("swiglu", cpu=cpu.swiglu, cuda="samebit.kernels.gpu.swiglu:swiglu")


def swiglu_backward_ref(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of gate_up [..., 2F], in fp32 and rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = 1 / (1 + torch.exp(-gate))
    silu = gate * sigmoid
    grad = grad.float()
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat([grad_gate, grad * silu], dim=-1).to(gate_up.dtype)


_backward = Op(
    "swiglu_backward", cpu=swiglu_backward_ref, cuda="samebit.kernels.gpu.swiglu:swiglu_backward"
)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _backward(grad, *ctx.saved_tensors)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [..., 2F] = [gate; up] -> [..., F]; differentiable."""
    return applied(_Swiglu, gate_up)


def swiglu_linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    """The composition, by the device's own single operations: a bit reference."""
    return swiglu(linear(x, weight))


swiglu_linear = Op(
    "swiglu_linear", cpu=swiglu_linear_ref, cuda="samebit.kernels.gpu.linear:swiglu_linear"
)
"""swiglu(linear(x, weight)) for inference: x [M, K], weight [2F, K] = [gate; up] -> [M, F]."""
