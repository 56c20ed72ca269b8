"""What single decisions cost or gain: the same engine with one of them made otherwise."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samebit.kernels import attention as attention_op
from samebit.kernels import linear as linear_op
from samebit.kernels import swiglu as swiglu_op
from samebit.kernels.op import Op

SETTINGS: dict[str, dict[str, Any]] = {
    "no_graphs": {"cuda_graphs": False},
    "no_overlap": {"overlap": False},
    "no_groups": {"group_attention": False},
    "no_table": {},
}
"""Arguments of Engine that a variant sets."""

NOTES = {
    "torch_kernels": "linear is torch's own product (cuBLAS as it chooses, split-K included); "
    "all other operations stay the engine's (torch has no attention over a paged cache)"
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

    def product(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        calls.count += 1
        if out_dtype in (None, x.dtype):
            return F.linear(x, weight)
        return torch.mm(x, weight.t(), out_dtype=out_dtype)

    def gated(x: Tensor, weight: Tensor) -> Tensor:
        return swiglu_op.swiglu(product(x, weight))

    def in_segments(x: Tensor, weight: Tensor, _num_segments: int) -> Tensor:
        return product(x, weight, torch.float32)

    replacements: list[tuple[Op, Callable[..., Any]]] = [
        (linear_op._forward, product),
        (linear_op._forward_in_segments, in_segments),
        (swiglu_op.swiglu_linear, gated),
    ]
    with _replaced(device_type, replacements):
        yield calls


@contextmanager
def torch_trainer_kernels(device_type: str) -> Iterator[Calls]:
    """torch's own matrix product and attention in the trainer's forward, without gradients."""

    def attend(q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float) -> tuple[Tensor, None]:
        ends, longest = plan.boundaries, max(plan.seq_lens)
        output, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, ends, ends, longest, longest, 0.0, True, False, scale=scale
        )
        return output, None

    with (
        torch_kernels(device_type) as calls,
        _replaced(device_type, [(attention_op.attend, attend)]),
    ):
        yield calls


@contextmanager
def _replaced(
    device_type: str, functions: Sequence[tuple[Op, Callable[..., Any]]]
) -> Iterator[None]:
    before = [op.implementations[device_type] for op, _ in functions]
    for op, function in functions:
        op.implementations[device_type] = function
    try:
        yield
    finally:
        for (op, _), implementation in zip(functions, before, strict=True):
            op.implementations[device_type] = implementation


def kernels_of(variant: str, device_type: str) -> AbstractContextManager[Calls | None]:
    """The context in which the variant's engine lives."""
    if variant == "no_table" and device_type == "cuda":
        from samebit.kernels.gpu.tuning import without_tables  # needs Triton

        return without_tables()
    return torch_kernels(device_type) if variant == "torch_kernels" else nullcontext()
