"""Kernels compiled many at a time, before they are needed, on a machine that has compiled none.

Triton's compiler lets go of the interpreter, so that threads do. What is compiled stays in Triton's
cache folder. A kernel is also loaded there: for that a C compiler makes its launcher, which takes
as long as many a kernel.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

_MOST_THREADS = 16
_ahead: ContextVar[bool] = ContextVar("compiling_ahead", default=False)
_lock = Lock()
_run: Any = JITFunction.run
_inside: list[object] = []


def _compile_or_run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    return _run(self, *args, grid=grid, warmup=warmup or _ahead.get(), **options)


class _Loading(triton.AsyncCompileMode):
    """Compiles, and loads to the device of the thread that asks."""

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Any) -> Any:
        device = torch.cuda.current_device()

        def loaded() -> Any:
            torch.cuda.set_device(device)
            kernel = compile_fn()
            kernel._init_handles()
            return kernel

        return super().submit(key, loaded, finalize_fn)


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """In the block this thread's Triton kernels are compiled and not run; at its end all are.

    What they would write stays as it is. A kernel that does not compile is none here: whoever runs
    it learns why. Other threads run theirs.
    """
    block = object()
    with _lock:
        _inside.append(block)
        JITFunction.run = _compile_or_run  # type: ignore[method-assign]
    token = _ahead.set(True)
    try:
        threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads) as pool, _Loading(pool, ignore_errors=True):
            yield
    finally:
        _ahead.reset(token)
        with _lock:
            _inside.remove(block)
            if not _inside:
                JITFunction.run = _run  # type: ignore[method-assign]
