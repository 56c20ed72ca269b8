"""The price of each promise: the same engine with one of its decisions undone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from samebit.kernels import linear as linear_op
from samebit.kernels import swiglu as swiglu_op
from samebit.kernels.op import Op

SETTINGS: dict[str, dict[str, Any]] = {
    "no_graphs": {"cuda_graphs": False},
    "no_overlap": {"overlap": False},
}
"""Arguments of Engine that a variant sets."""

NOTES = {
    "torch_kernels": "linear is torch's own product (cuBLAS as it chooses, split-K included); "
    "attention and all other operations stay the engine's",
}


class Calls:
    """Counts calls, to see that a replaced implementation is used."""

    count = 0


@contextmanager
def torch_kernels(device_type: str) -> Iterator[Calls]:
    """torch's own matrix product in place of linear's implementation for the device type.

    Operations fused with a product become their compositions, which use that product.
    """
    calls = Calls()

    def product(
        x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        calls.count += 1
        if out_dtype in (None, x.dtype):
            return F.linear(x, weight)
        return torch.mm(x, weight.t(), out_dtype=out_dtype)

    def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return swiglu_op.swiglu(product(x, weight))

    functions: list[tuple[Op, Callable[..., Any]]] = [(linear_op._forward, product)]
    if fused := getattr(swiglu_op, "_swiglu_linear", None):
        functions.append((fused, gated))
    before = [op.implementations[device_type] for op, _ in functions]
    for op, function in functions:
        op.implementations[device_type] = function
    try:
        yield calls
    finally:
        for (op, _), implementation in zip(functions, before, strict=True):
            op.implementations[device_type] = implementation


def kernels_of(variant: str, device_type: str) -> AbstractContextManager[Calls | None]:
    """The context in which the variant's engine lives."""
    return torch_kernels(device_type) if variant == "torch_kernels" else nullcontext()
