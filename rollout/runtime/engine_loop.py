"""EngineLoop: any number of callers, one thread at a time that drives the engine's steps.

The caller of `run` drives by itself if nobody does. Whatever else comes, from asyncio or from other
threads, goes into an inbox, which the driver empties between two steps. When a driver leaves while
somebody still waits, a thread of the loop goes on until nobody does; it is not there otherwise.
While generation is paused the driver waits for what comes into the inbox.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from samebit.rollout.client import Begun, Progress, Tell
from samebit.rollout.device import on_device
from samebit.rollout.messages import Leave
from samebit.rollout.runtime.call import Call, uncancelled
from samebit.rollout.runtime.request_book import RequestBook
from samebit.rollout.types import Completion, Request

_PROGRESS_S = 0.05  # how often a caller who does not drive is told of progress
_ORPHAN_S = 1.0  # how often the loop's thread sees whether anybody is left who may continue
_STARTING = 0  # no thread's number: the loop's thread is about to drive


class EngineLoop:
    """Drives the steps of an engine for all its callers; any thread may call its methods."""

    def __init__(self, book: RequestBook) -> None:
        self.book = book
        self._inbox: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._came = threading.Condition()  # something into the inbox
        self._mutex = threading.Lock()  # held for moments, to take or to hand on the driver's place
        self._driver: int | None = None  # the number of the thread that drives

    # -- callers ---------------------------------------------------------------------------------

    def run(self, requests: Sequence[Request], progress: Progress | None) -> list[list[Completion]]:
        """Complete the requests; those of others take part in the steps."""
        call, drawn_before = Call(requests), self.book.num_drawn
        patience = None if progress is None else _PROGRESS_S
        with self._driving() as drives:
            try:
                if drives:
                    self.book.admit(call)
                else:
                    self.submit(call)
                while not call.result.done():
                    if drives:
                        self._empty_inbox()
                        if not call.result.done():
                            self._advance(patience)
                    else:
                        wait([call.result], patience)
                    if progress is not None:
                        progress(call.num_ended, self.book.num_drawn - drawn_before)
            except BaseException:
                abandoned = self.abandon(call)
                del call  # its result may hold the error, whose traceback holds this frame
                abandoned.exception()  # the first error is the one to tell
                raise
        return call.result.result()

    def begin(
        self, requests: Sequence[Request], tell: Tell | None = None
    ) -> Begun[list[list[Completion]]]:
        """`run` for those who do not wait in a thread of their own."""
        call = Call(requests, tell)
        abandon = partial(self.abandon, call)
        try:
            return self.submit(call), abandon
        except BaseException:
            with suppress(RuntimeError):  # no thread can be started: nobody would ask for it
                abandon()
            raise

    def submit(self, call: Call) -> Future[list[list[Completion]]]:
        """Put a call in and do not wait; its result."""
        self.post(partial(self.book.admit, call, alone=True))
        return call.result

    def abandon(self, call: Call) -> Future[None]:
        """The caller has gone: abort what is unfinished of its requests."""
        return self.post(partial(self.book.abandon, call))

    def leave_off(self, calls: Sequence[Call]) -> Future[None]:
        """See RequestBook.leave_off."""
        return self.post(partial(self.book.leave_off, calls))

    def pause(self, mode: str) -> None:
        """See RequestBook.pause; several ranks do it in the thread that drives."""
        caller = threading.get_ident()
        self.between_steps(lambda: self.book.pause(mode, alone=threading.get_ident() != caller))

    @contextmanager
    def leading(self, marks: Callable[[], tuple[int, int]]) -> Iterator[None]:
        """In the block rank 0 decides for all ranks; `marks` is asked at its end, see Leave."""
        self.book.lockstep.begin(leads=True)
        stop = partial(self.book.stop_leading, marks)
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # the first error is the one to tell
                self.between_steps(stop)
            raise
        self.between_steps(stop)

    def follow(self, take_asked: Callable[[int], None]) -> Leave:
        """Do what rank 0 does in its block; what it says at the end. See RequestBook.follow."""
        self.book.lockstep.begin(leads=False)
        return self.between_steps(partial(self.book.follow, take_asked))

    # -- who drives ------------------------------------------------------------------------------

    def weak_between_steps(self) -> Callable[[Callable[[], Any]], Any]:
        """between_steps for what the loop itself holds, as long as there is a loop: no cycle."""
        held = weakref.ref(self)

        def between_steps(command: Callable[[], Any]) -> Any:
            loop = held()
            return command() if loop is None else loop.between_steps(command)

        return between_steps

    def between_steps[T](self, command: Callable[[], T]) -> T:
        """The result of a command that runs while no step does."""
        with self._driving() as drives:
            if drives:
                return command()
        return self.post(command).result()

    def post[T](self, command: Callable[[], T]) -> Future[T]:
        """Have the driver run a command between two steps; at once, if nobody drives."""
        future = uncancelled()
        with self._came:
            self._inbox.append((command, future))
            self._came.notify_all()
        with self._driving() as drives:
            if drives:
                self._empty_inbox()
        return future

    @contextmanager
    def _driving(self) -> Iterator[bool]:
        """Whether this thread drives in the block: if it does already, or else nobody."""
        me = threading.get_ident()
        with self._mutex:
            before = self._driver
            drives = before in (None, me)
            if drives:
                self._driver = me
        try:
            with on_device(self.book.device):
                yield drives
        finally:
            if before is None:
                self._hand_on()

    def _hand_on(self) -> None:
        """Leave the driver's place: to the loop's thread if anybody waits, else to nobody."""
        if self._rest():
            return
        self._driver = _STARTING
        # torch counts threads for each thread; another number could give other bits.
        arguments = (torch.get_num_threads(),)
        thread = threading.Thread(target=self._drive, args=arguments, name="samebit engine loop")
        try:
            thread.start()
        except BaseException:  # too many threads, or the interpreter ends: the next caller drives
            self._driver = None
            raise

    def _rest(self) -> bool:
        """Whether nobody waits for anything; then nobody drives from here on."""
        with self._mutex:
            if self._inbox or self.book.calls:
                return False
            self._driver = None
            return True

    def _drive(self, num_threads: int) -> None:
        """What the loop's thread does: step until nobody waits."""
        self._driver = threading.get_ident()
        torch.set_num_threads(num_threads)
        if self.book.device.type == "cuda":
            torch.cuda.set_device(self.book.device)
        while not self._rest():
            try:
                self._empty_inbox()
                if self.book.calls:
                    self._advance(_ORPHAN_S)
                if self.book.is_paused and not threading.main_thread().is_alive():
                    self.book.abandon_all()  # else the interpreter would not end
            except BaseException as error:  # noqa: BLE001 - it goes to every caller
                self.book.fail_all(error)

    def _advance(self, patience: float | None) -> None:
        """Step; while generation is paused, wait for what comes, so many seconds at most."""
        if not self.book.is_paused:
            self.book.step()
            return
        with self._came:
            self._came.wait_for(lambda: self._inbox, patience)

    def _empty_inbox(self) -> None:
        while self._inbox:
            command, future = self._inbox.popleft()
            try:
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise
