"""rms_norm: y = x * rsqrt(mean(x^2) + eps) * weight over the last dimension, in fp32.

Contract: one row at a time, its sum of squares in one fixed order. A residual is added and rounded
to the activation dtype first. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
"""

from typing import Any

import torch
from torch import Tensor

from samebit.kernels.cpu import rms_norm as cpu
from samebit.kernels.op import Op, applied


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D], computed in fp32 and rounded once to x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


_forward = Op("rms_norm", cpu=cpu.rms_norm, cuda="samebit.kernels.gpu.rms_norm:rms_norm")


def rms_norm_backward_ref(
    grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x [..., D] and weight [D], in fp32 and rounded once."""
    normed = x.float() * inverse_rms
    grad_weight = (grad.float() * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    scaled = grad.float() * weight.float()
    projection = (scaled * normed).sum(-1, keepdim=True) / x.shape[-1]
    return ((scaled - normed * projection) * inverse_rms).to(x.dtype), grad_weight


_backward = Op(
    "rms_norm_backward",
    cpu=rms_norm_backward_ref,
    cuda="samebit.kernels.gpu.rms_norm:rms_norm_backward",
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse_rms = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grad, *ctx.saved_tensors), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [..., D] by its root mean square and scale by weight [D]; differentiable."""
    return applied(_RmsNorm, x, weight, eps)


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The composition, by the device's own single operations: a bit reference."""
    total = residual + x
    return rms_norm(total, weight, eps), total


add_rms_norm = Op(
    "add_rms_norm", cpu=add_rms_norm_ref, cuda="samebit.kernels.gpu.rms_norm:add_rms_norm"
)
"""(rms_norm(s), s) for s = x + residual [T, D], rounded before it is normalised; inference."""
