"""linear: y = x @ weight.T, every output element one fixed chain of sums over K.

Contract: an element of y depends on its own row of x and on the weight alone, never on the number
of rows or on the row's place among them. CPU: fp32 products over blocks of 16 rows. GPU: bf16, one
chain of tensor-core products in ascending k into one fp32 accumulator, one rounding.
"""

from typing import Any

import torch
from torch import Tensor

from samebit.kernels.cpu import linear as cpu
from samebit.kernels.op import Op, applied

_forward = Op("linear", cpu=cpu.linear, cuda="samebit.kernels.gpu.linear:linear")
_forward_in_segments = Op(
    "linear_in_segments",
    cpu=cpu.linear_in_segments,
    cuda="samebit.kernels.gpu.linear:linear_in_segments",
)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [N, K] fp32 += a [N, M] @ b [M, K], summed in fp32. Any of them may be empty."""
    if not a.numel() or not b.numel():
        return
    if a.dtype == torch.float32:
        total += a @ b
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class _Linear(torch.autograd.Function):
    """`product` of x, weight and `option`; the gradients are the plain product's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        main_grad: Tensor | None,
        product: Op,
        option: torch.dtype | int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad = main_grad
        return product(x, weight, option)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            if ctx.main_grad is None:
                grad_weight = grad.t() @ x
            else:
                add_product(ctx.main_grad, grad.t(), x)
        return grad_x, grad_weight, None, None, None


def linear(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None, main_grad: Tensor | None = None
) -> Tensor:
    """x [..., K] times weight [N, K] transposed -> [..., N]; it is differentiable in both.

    out_dtype: x's, or fp32 for what is not rounded yet (a partial sum) or never is (logits).
    main_grad [N, K] fp32: the buffer that the backward adds the weight's gradient to, unrounded;
    autograd is then given none.
    Raises ValueError for another dtype than the device's contract: fp32 on the CPU, bf16 on CUDA.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = applied(_Linear, rows, weight, main_grad, _forward, out_dtype or x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_in_segments(
    x: Tensor, weight: Tensor, num_segments: int, main_grad: Tensor | None = None
) -> Tensor:
    """linear as the tree_sum of products over equal parts of K, in fp32 and not rounded to less.

    x [..., K] times weight [N, K] transposed -> [..., N] fp32; it is differentiable in both.
    num_segments is a power of two that divides K; main_grad: as in `linear`.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = applied(_Linear, rows, weight, main_grad, _forward_in_segments, num_segments)
    return y.view(*x.shape[:-1], weight.shape[0])
