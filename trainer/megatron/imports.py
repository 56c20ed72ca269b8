"""Megatron without torch's compiler and wandb, whose imports take longer than all of its own.

Megatron decorates some fused functions with torch.compile as it is imported. No layer of ours calls
one: the operations are those of the numerics contract. Its timers, which would write to wandb, are
not used either.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch


@contextmanager
def lean_imports() -> Iterator[None]:
    """What the block imports of Megatron is not compiled, and refuses to run: other bits than the
    contract's would come of it. What it imports sees no wandb."""
    compile_, namespace = torch.compile, cast(Any, torch)

    def decorate(function: Any = None, **options: Any) -> Any:
        if not getattr(function, "__module__", "").startswith("megatron."):
            return compile_(function, **options)
        return _refused(function)

    namespace.compile = decorate
    hidden = "wandb" not in sys.modules
    if hidden:
        cast(Any, sys.modules)["wandb"] = None  # to import it is an ImportError
    try:
        yield
    finally:
        namespace.compile = compile_
        if hidden:
            del sys.modules["wandb"]


def _refused(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError(
            f"{function.__module__}.{function.__qualname__} is no operation of the numerics "
            "contract, and was not compiled"
        )

    return refuse
