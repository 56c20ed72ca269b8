"""One operation, one canonical meaning, one implementation per device type.

Shape letters used in the whole project: T tokens, B sequences, D model, N query heads, K kv heads,
H head dim, F ffn, V vocabulary, P pages, L length of one sample.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch


class Op:
    """Picks the implementation of a contract operation by the device of its first tensor.

    Every implementation of one device type returns the same bits; see docs/contract.md.
    """

    def __init__(self, name: str, **implementations: Callable[..., Any] | str) -> None:
        """An implementation is a function, or "module:function" to import when first needed."""
        self.name = name
        self.implementations = implementations

    def __call__(self, first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        implementation = self.implementations.get(first.device.type)
        if implementation is None:
            raise NotImplementedError(
                f"{self.name} has no implementation for device '{first.device.type}'; "
                f"it has: {', '.join(self.implementations)}"
            )
        if isinstance(implementation, str):
            module, function = implementation.split(":")
            implementation = getattr(importlib.import_module(module), function)
            self.implementations[first.device.type] = implementation
        return implementation(first, *args, **kwargs)


def require_fp32(name: str, *tensors: torch.Tensor) -> None:
    """Raise ValueError unless all tensors are fp32: the only dtype of the CPU contract."""
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} on the CPU takes torch.float32, got {tensor.dtype}")
