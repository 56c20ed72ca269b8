"""Kernels compiled many at a time, before they are needed, on a machine that has compiled none.

Triton's compiler lets go of the interpreter, so that threads do. What is compiled stays in Triton's
cache folder.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """In the block this process's Triton kernels are compiled and not run; at its end all are.

    What they would write stays as it is. A kernel that does not compile is none here: whoever runs
    it learns why.
    """
    run: Any = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        JITFunction.run = compile_only  # type: ignore[method-assign]
        try:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                yield
        finally:
            JITFunction.run = run  # type: ignore[method-assign]
