"""The fp32 buffers in which Megatron sums up gradients: the one place that knows its attributes."""

from collections.abc import Iterable

from torch import Tensor


def main_grad_of(weight: Tensor) -> Tensor | None:
    """The buffer, if any, that products on a GPU add the weight's gradient to without rounding.

    Where there is none, autograd is given the gradient and Megatron's hook adds it to the buffer.
    """
    fused = weight.is_cuda and not getattr(weight, "own_gradient", False)
    return getattr(weight, "main_grad", None) if fused else None


def grad_buffer(weight: Tensor) -> Tensor:
    """The buffer of a weight that Megatron's DDP holds."""
    return weight.main_grad  # type: ignore[attr-defined, no-any-return]


def own_gradients(weights: Iterable[Tensor]) -> None:
    """Have autograd be given these weights' gradients: something waits for it to get them."""
    for weight in weights:
        weight.own_gradient = True  # type: ignore[attr-defined]
