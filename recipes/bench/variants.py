"""The price of each promise: the same engine with one of its decisions undone."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from samebit.kernels import linear as linear_op

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
    """torch's own matrix product in place of linear's implementation for the device type."""
    calls = Calls()
    implementations = linear_op._forward.implementations

    def product(
        x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        calls.count += 1
        if out_dtype in (None, x.dtype):
            return F.linear(x, weight)
        return torch.mm(x, weight.t(), out_dtype=out_dtype)

    before = implementations[device_type]
    implementations[device_type] = product
    try:
        yield calls
    finally:
        implementations[device_type] = before


def kernels_of(variant: str, device_type: str) -> AbstractContextManager[Calls | None]:
    """The context in which the variant's engine lives."""
    return torch_kernels(device_type) if variant == "torch_kernels" else nullcontext()
