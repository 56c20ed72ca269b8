"""One operation, one canonical meaning, one implementation per device type.

docs/contract.md writes out the meaning. kernels/<operation>.py holds reference, gradients and
dispatch; kernels/cpu/ and kernels/gpu/ hold implementations, which know nothing of the dispatch.

Shape letters (T, B, D, Hq, Hkv, Dh, F, V, P, L; M, N, K of products) and words: docs/design.md.
"""

import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Op[**P, R]:
    """Picks the implementation of a contract operation by the device of its first tensor.

    Every implementation of one device type returns the same bits; see docs/contract.md. Raises
    ValueError for floats other than fp32 on the CPU, whose contract knows no other dtype.
    """

    def __init__(self, name: str, cpu: Callable[P, R], cuda: Callable[P, R] | str = "") -> None:
        """`cuda` may be "module:function", imported when it is first called: it needs triton."""
        self.name = name
        self.implementations: dict[str, Callable[P, R] | str] = {"cpu": cpu}
        if cuda:
            self.implementations["cuda"] = cuda

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        device: Any = args[0].device  # type: ignore[attr-defined]
        implementation = self.implementations.get(device.type)
        if implementation is None:
            raise NotImplementedError(
                f"{self.name} has no implementation for device '{device.type}'; "
                f"it has: {', '.join(self.implementations)}"
            )
        if isinstance(implementation, str):
            implementation = pkgutil.resolve_name(implementation)
            self.implementations[device.type] = implementation
        if device.type == "cpu":
            self._require_fp32(*args)
        return implementation(*args, **kwargs)

    def _require_fp32(self, *args: object) -> None:
        for x in args:
            if isinstance(x, Tensor) and x.dtype != torch.float32 and x.is_floating_point():
                raise ValueError(f"{self.name} on the CPU takes torch.float32, got {x.dtype}")


class _KeepsNothing:
    """The context of a forward that no backward follows."""

    def save_for_backward(self, *_tensors: Tensor) -> None:
        """See torch.autograd.Function."""


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), without autograd's own time where no gradients are recorded."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(_KeepsNothing(), *args)
