"""SIGTERM and SIGINT: the first ends a run where nothing is half done, a second one at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Stopped(Exception):
    """A signal has ended the run, and what was done is saved: no failure."""


class StopSignals:
    """Remembers the first signal until `poll` or `poll_together` is called at a safe point."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._pid = os.getpid()

    def poll(self) -> None:
        """Raise Stopped if a signal has come: what was begun since the last step is dropped.

        One of several processes goes on: the others may be elsewhere in the step.
        """
        from samebit.trainer.ranks import place  # not at the top: --help needs no torch

        if place()[1] == 1:
            self.poll_alone()

    def poll_alone(self) -> None:
        """Raise Stopped if a signal has come to this process, which tells the others itself."""
        if self.received is not None:
            raise Stopped(self.received.name)

    def poll_together(self) -> None:
        """Raise Stopped on every process, all of which call it, if a signal has come to one."""
        from samebit.weight_sync.objects import gather_objects

        names = gather_objects(self.received.name if self.received is not None else "")
        if received := [name for name in names if name]:
            raise Stopped(received[0])

    def handle(self, number: int, _frame: Any) -> None:
        """Handle a signal; writes past Python's buffers, which it may have interrupted.

        A forked child, such as a reward may start, has inherited it and ends at its first signal.
        """
        if self.received is not None or os.getpid() != self._pid:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        text = f"\nsamebit: {self.received.name}: stopping soon; once more to exit at once\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())


@contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle both signals within the block; outside the main thread nothing is handled."""
    with handlers_given_back() as numbers:
        for number in numbers:
            signal.signal(number, handler)
        yield


@contextmanager
def handlers_given_back() -> Iterator[tuple[int, ...]]:
    """Both signals; whoever handled them before the block does so behind it. None outside the main
    thread, which alone can say who handles them."""
    if threading.current_thread() is not threading.main_thread():
        yield ()
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield tuple(previous)
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Remember both signals within the block, in the main thread."""
    stop = StopSignals()
    with handled_by(stop.handle):
        yield stop


def signal_name(number: int) -> str:
    """Return the name of a signal, or its number where it has none."""
    known = {s.value: s.name for s in signal.Signals}
    return known.get(number, f"signal {number}")
