"""linear: y = x @ weight.T, every output element one fixed chain of sums over k.

Contract: an element of y depends on its own row of x and on the weight alone, never on the number
of rows or on the row's place among them. CPU: fp32, rows padded to blocks of 16. A plain CPU
matmul is not row-invariant: below 16 rows the BLAS takes other code paths.

Two CPU implementations give the same bits: one product over all padded rows (fast), or one product
per block of 16 rows. `selfcheck` proves it for a model's shapes and falls back to the second.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from samebit.kernels.op import Op, require_fp32

ROW_BLOCK = 16

# Weight shapes (N, K) for which the self-check found the one-product path unequal on this machine.
_blocked_shapes: set[tuple[int, int]] = set()


def linear_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] @ weight [N, K].T in plain torch: a tolerance reference."""
    return x @ weight.t()


def use_blocked(shapes: set[tuple[int, int]]) -> None:
    """Compute products with these weight shapes (N, K) block by block from now on."""
    _blocked_shapes.update(shapes)


def linear_padded(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One product over x [T, K] padded to a multiple of 16 rows."""
    num_rows = x.shape[0]
    pad = -num_rows % ROW_BLOCK
    if pad:
        x = F.pad(x, (0, 0, 0, pad))
    return torch.mm(x, weight.t())[:num_rows]


def linear_blocked(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One product per block of 16 rows of x [T, K]: row-invariant by construction."""
    return torch.cat([linear_padded(rows, weight) for rows in x.split(ROW_BLOCK)])


def _linear_cpu(
    x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    require_fp32("linear", x, weight)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    if tuple(weight.shape) in _blocked_shapes:
        return linear_blocked(x, weight)
    return linear_padded(x, weight)


_forward = Op("linear", cpu=_linear_cpu, cuda="samebit.kernels.gpu.linear:linear")


def main_grad_of(weight: torch.Tensor) -> torch.Tensor | None:
    """The fp32 buffer, if any, in which a trainer on a GPU sums up the weight's gradient.

    Products are added to it without being rounded first, and autograd is given no gradient.
    """
    fused = weight.is_cuda and not getattr(weight, "own_gradient", False)
    return getattr(weight, "main_grad", None) if fused else None


def own_gradients(weights: Iterable[torch.Tensor]) -> None:
    """Have autograd be given these weights' gradients: something waits for it to get them."""
    for weight in weights:
        weight.own_gradient = True  # type: ignore[attr-defined]


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total [N, K] fp32 += a [N, T] @ b [T, K], summed in fp32. Any of them may be empty."""
    if not a.numel() or not b.numel():
        return
    if a.dtype == torch.float32:
        total += a @ b
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad = main_grad_of(weight)
        return _forward(x, weight, out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            if ctx.main_grad is None:
                grad_weight = grad.t() @ x
            else:
                add_product(ctx.main_grad, grad.t(), x)
        return grad_x, grad_weight, None


def tree_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum of a power of two of equally shaped tensors, neighbours first: ((0 + 1) + (2 + 3))."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _in_segments_cpu(x: torch.Tensor, weight: torch.Tensor, num_segments: int) -> torch.Tensor:
    parts = zip(x.chunk(num_segments, 1), weight.chunk(num_segments, 1), strict=True)
    return tree_sum([_linear_cpu(a, b) for a, b in parts])


_forward_in_segments = Op(
    "linear_in_segments",
    cpu=_in_segments_cpu,
    cuda="samebit.kernels.gpu.linear:linear_in_segments",
)


class _LinearInSegments(_Linear):
    """The gradients are the plain product's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, num_segments: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad = main_grad_of(weight)
        return _forward_in_segments(x, weight, num_segments)


def linear_in_segments(x: torch.Tensor, weight: torch.Tensor, num_segments: int) -> torch.Tensor:
    """linear as the tree_sum of products over equal parts of K, in fp32 and not rounded to less.

    x [..., K] times weight [N, K] transposed -> [..., N] fp32; differentiable in both. num_segments
    is a power of two that divides K.
    """
    y = _LinearInSegments.apply(x.reshape(-1, x.shape[-1]), weight, num_segments)
    return y.view(*x.shape[:-1], weight.shape[0])


def logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [T, D] times weight [V, D] transposed -> [T, V] in fp32, never rounded to less."""
    return _forward(hidden, weight, torch.float32)


def linear(
    x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [..., K] times weight [N, K] transposed -> [..., N]; differentiable in both.

    out_dtype: x's, or fp32 for a partial sum that is not rounded yet.
    Raises ValueError for another dtype than the device's contract: fp32 on the CPU, bf16 on CUDA.
    """
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, out_dtype or x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])
