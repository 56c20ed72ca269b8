"""add_bias: what a product with a bias adds to its sums.

Contract: the bias, widened to fp32, is added once to the finished fp32 sum of products; then comes
the one rounding.
"""

from typing import Any

import torch
from torch import Tensor

from samebit.kernels.linear import linear
from samebit.kernels.op import Op, applied


def add_bias_ref(y: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """y [..., N] + bias [N] in fp32, rounded to dtype, in plain torch: a bit reference."""
    return (y.float() + bias.float()).to(dtype)


def _add_bias_cuda(y: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """One kernel of torch's: it widens as it reads, adds in fp32 and rounds as it writes."""
    return torch.add(y, bias, out=torch.empty(y.shape, dtype=dtype, device=y.device))


_forward = Op("add_bias", cpu=add_bias_ref, cuda=_add_bias_cuda)


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.bias_dtype = bias.dtype
        return _forward(y, bias, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_bias = None
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])
            grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad.float() if ctx.needs_input_grad[0] else None, grad_bias, None


def add_bias(y: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """y [..., N] fp32, a finished sum, plus bias [N] -> [..., N] in dtype; differentiable in both.

    Raises ValueError for another dtype than fp32 on the CPU.
    """
    return applied(_AddBias, y, bias, dtype)


def linear_with_bias(
    x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None = None
) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N] where there is one: [..., N].

    It is differentiable in all of them; main_grad is the weight's, as in `linear`. Raises
    ValueError as linear does.
    """
    if bias is None:
        return linear(x, weight, main_grad=main_grad)
    return add_bias(linear(x, weight, torch.float32, main_grad), bias, x.dtype)
