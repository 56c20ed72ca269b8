"""torch's deterministic implementations, for the operations that are torch's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

_SETTINGS: Any = torch.utils.deterministic


@contextmanager
def deterministic() -> Iterator[None]:
    """Have torch's operations in the block be deterministic, whatever the user's setting.

    New tensors are not filled with NaN there, which torch does otherwise: each takes a kernel.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _SETTINGS.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    _SETTINGS.fill_uninitialized_memory = False
    try:
        yield
    finally:
        _SETTINGS.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
