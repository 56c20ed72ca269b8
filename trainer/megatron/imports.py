"""Megatron without torch's compiler, whose import takes longer than all of Megatron's own.

Megatron decorates some fused functions with torch.compile as it is imported. No layer of ours calls
one: the operations are those of the numerics contract.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch


@contextmanager
def without_compiler() -> Iterator[None]:
    """What the block imports of Megatron is not compiled, and refuses to run: other bits than the
    contract's would come of it."""
    compile_, namespace = torch.compile, cast(Any, torch)

    def decorate(function: Any = None, **options: Any) -> Any:
        if not getattr(function, "__module__", "").startswith("megatron."):
            return compile_(function, **options)
        return _refused(function)

    namespace.compile = decorate
    try:
        yield
    finally:
        namespace.compile = compile_


def _refused(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError(
            f"{function.__module__}.{function.__qualname__} is no operation of the numerics "
            "contract, and was not compiled"
        )

    return refuse
