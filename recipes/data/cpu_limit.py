"""A limit of what others' code may take of the CPU. No torch here."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN_S = 0.1


class OverLimit(BaseException):
    """The block has taken too long: no Exception, which what runs in it may catch."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise OverLimit in the block, and behind it, once this process has taken so many seconds of
    the CPU in it: time in which it stood still does not count, so that a busy machine is no reason.

    Again and again, where that is caught. Raises ValueError outside the main thread.
    """
    inside, over = True, False

    def ring(*_: Any) -> None:
        nonlocal over
        if inside:
            over = True
            raise OverLimit

    before = signal.signal(signal.SIGPROF, ring)
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds, _AGAIN_S)
        try:
            yield
        finally:
            inside = False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if over:
        raise OverLimit
