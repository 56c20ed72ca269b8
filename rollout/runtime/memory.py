"""Arena: the one place where the engine's large buffers come from.

Plain torch allocations now. Releasable memory later changes this file alone: buffers are asked for
by tag ("weights", "kv"), and a tag is what is released and resumed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Arena:
    """Named device buffers, grouped by tag."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, dict[str, Tensor]] = {}

    def allocate(self, tag: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised buffer; ValueError if the tag already has the name."""
        buffers = self._buffers.setdefault(tag, {})
        if name in buffers:
            raise ValueError(f"buffer '{name}' of '{tag}' is allocated already")
        buffers[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return buffers[name]

    def adopt(self, tag: str, buffers: Mapping[str, Tensor]) -> None:
        """Take memory that somebody else owns in place of the tag's buffers."""
        self._buffers[tag] = dict(buffers)
