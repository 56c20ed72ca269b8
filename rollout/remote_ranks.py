"""The processes of an engine apart, as its caller sees them: its tensor parallel ranks, or one.

Each has a connection. What is drawn is asked of rank 0, which leads the others step by step; what
changes weights or memory is sent to all, who do it when rank 0 does. They live and die together.
"""

import itertools
import multiprocessing
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from samebit.rollout.client import Tell
from samebit.rollout.engine_process import PARTED, START, serve_parent
from samebit.rollout.messages import Answer, Ask, Beat, Done, Drew, Meet, Message, Stop
from samebit.rollout.runtime.call import uncancelled
from samebit.weight_sync.failures import CrashError
from samebit.weight_sync.meeting import LOOPBACK, host_store, listener_at
from samebit.weight_sync.types import LostMemberError

# A child has nothing of this process, of a GPU's context least of all.
CONTEXT = multiprocessing.get_context("spawn")
_EXIT_S = 60.0  # how long a process may take to end that is told to, on a busy machine
_EXIT_CODE_S = 5.0  # how long a process may take to end after its end of the pipe


class RemoteEngineError(CrashError):
    """A process of the engine died."""


class EngineProcess(Protocol):
    """A process that an engine is in, as this one sees it; multiprocessing's are such."""

    @property
    def pid(self) -> int | None:
        """Its number on its machine."""

    @property
    def exitcode(self) -> int | None:
        """What it ended with, where that is known."""

    def is_alive(self) -> bool:
        """Whether it is there."""

    def kill(self) -> None:
        """End it at once, or soon, and the connection with it."""

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""


@dataclass(frozen=True)
class Launched:
    """A process that serves an engine, and this end of the connection with it."""

    process: EngineProcess
    connection: Connection
    address: str = LOOPBACK
    """This machine, as that process reaches it."""
    node: str = ""
    """The machine that it is on, to be told; "": this one."""


type Launcher = Callable[[str, int, dict[str, Any], int], Sequence[Launched]]
"""Starts so many processes of one machine, the ranks of an engine, each of which calls
engine_process.serve with a connection and these arguments."""


def launch_here(
    model_path: str, cpu_threads: int, settings: dict[str, Any], size: int
) -> list[Launched]:
    """The Launcher of child processes; device: rank 0's GPU, and the others have the next ones."""
    return [
        _launch_here(model_path, cpu_threads, settings_of(rank, settings)) for rank in range(size)
    ]


def _launch_here(model_path: str, cpu_threads: int, settings: dict[str, Any]) -> Launched:
    connection, child = CONTEXT.Pipe()
    arguments = child, model_path, cpu_threads, settings
    process = CONTEXT.Process(target=serve_parent, args=arguments, daemon=True)
    process.start()
    child.close()
    return Launched(process, connection)


def settings_of(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A rank's, of those whose device is rank 0's: of a GPU the next ones."""
    first = settings.get("device")
    if first is None and torch.cuda.is_available():
        first = "cuda"
    if not rank or first is None or torch.device(first).type != "cuda":
        return settings
    return settings | {"device": torch.device("cuda", (torch.device(first).index or 0) + rank)}


class _Pipe:
    """Sends one rank's calls, each with a number; a thread gives the answers to who waits for them.

    `started` is the first answer: whether the engine could be made.
    """

    def __init__(self, launched: Launched, death: Callable[[], RemoteEngineError]) -> None:
        """death: asked at the end of the process, which has come or is at hand: what to say."""
        self._connection, self._process = launched.connection, launched.process
        self._death = death
        self._heard_at = time.monotonic()
        self._lock = threading.Lock()  # of a call's registration and its message
        self.started = uncancelled()
        self._waiting: dict[int, tuple[Future[Any], Tell | None]] = {START: (self.started, None)}
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="samebit answers", daemon=True)
        self._reader.start()

    def call(self, number: int, message: Message, tell: Tell | None = None) -> Future[Any]:
        """A call's result to come. RemoteEngineError if the process has died."""
        result = uncancelled()
        with self._lock:
            if self._ended:
                raise self._death()
            self._waiting[number] = (result, tell)
            try:
                self._connection.send((number, message))
            except BaseException as error:
                self._waiting.pop(number, None)
                if isinstance(error, OSError):
                    raise self._death() from error
                raise
        return result

    def tell(self, message: Meet | Stop) -> None:
        """Send what has no answer of its own, to a process that may have ended."""
        with self._lock, suppress(OSError):
            self._connection.send((START, message))

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat or answer; 0 while there is one that is not read here."""
        with suppress(OSError):  # it is closed
            if self._connection.poll():
                return 0.0
        return time.monotonic() - self._heard_at

    def close(self) -> None:
        self._reader.join(timeout=_EXIT_CODE_S)
        self._connection.close()

    def _read(self) -> None:
        unreadable: Exception | None = None
        try:
            while True:
                self._take(*self._connection.recv())
        except (EOFError, OSError):
            pass  # the process has ended
        except Exception as error:  # noqa: BLE001 - an answer is lost: nobody may wait for it
            unreadable = error
            self._process.kill()
        with self._lock:
            self._ended = True
        death = self._death()
        death.__cause__ = unreadable
        for result, _ in self._waiting.values():
            result.set_exception(death)

    def _take(self, number: int, answer: Answer) -> None:
        self._heard_at = time.monotonic()
        if isinstance(answer, Beat):
            return
        if (waiting := self._waiting.get(number)) is None:
            return  # whoever called was interrupted as the call went out
        result, tell = waiting
        if isinstance(answer, Drew):
            assert tell is not None
            tell(answer.increments)
            return
        self._waiting.pop(number, None)
        if isinstance(answer, Done):
            result.set_result(answer.value)
        else:
            result.set_exception(answer.error)


class EngineRanks:
    """All processes of one engine. One that ends by itself takes the others along: what is left of
    the engine would wait for it."""

    def __init__(self, launched: Sequence[Launched]) -> None:
        self.processes = [each.process for each in launched]
        self.address = launched[0].address
        self._launched = launched
        self._lost: Launched | None = None
        self._burying = threading.Lock()
        self._is_closing = False
        self._numbers = itertools.count(START + 1)
        self._sending = threading.Lock()  # to several: what all ranks do has one order
        self._pipes = [_Pipe(each, self.death) for each in launched]
        self.started = _OfAll([pipe.started for pipe in self._pipes]).result
        """Of all: done when they have made their engines, or one could not."""
        self._store: Any = None  # where several ranks meet; as long as they live

    def start(self) -> None:
        """Have all make their engines; see `started`."""
        size, place = len(self._pipes), ("", 0, "")
        if size > 1:
            self._store = host_store(listener_at(self.address))
            place = self.address, self._store.port, secrets.token_hex(32)
        for rank, pipe in enumerate(self._pipes):
            pipe.tell(Meet(rank, size, *place))

    def call(self, message: Message, tell: Tell | None = None) -> tuple[int, Future[Any]]:
        """A call's number and its result to come. RemoteEngineError if a process has died.

        An Ask goes to all ranks; its result is rank 0's, or the first failure.
        """
        first, *others = self._pipes
        if not isinstance(message, Ask) or not others:
            number = next(self._numbers)
            return number, first.call(number, message, tell)
        with self._sending:
            number = next(self._numbers)
            # Rank 0 last: once it has it, the others will find it.
            results = [pipe.call(number, message) for pipe in others]
            results.insert(0, first.call(number, message, tell))
        return number, _OfAll(results).result

    @property
    def silent_s(self) -> float:
        """Seconds since rank 0 was last heard of: it beats when all ranks have met."""
        return self._pipes[0].silent_s

    @property
    def is_alive(self) -> bool:
        """Whether all are there."""
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """End all at once."""
        for process in self.processes:
            process.kill()

    def death(self) -> RemoteEngineError:
        """What to say of the end of one, which has come or is at hand: all have ended then."""
        with self._burying:
            lost = self._lost = self._lost or self._find_lost()
            for process in () if self._is_closing else self.processes:
                if process is not lost.process:
                    process.kill()
                    process.join(_EXIT_CODE_S)
        where = f" on {lost.node}" if lost.node else ""
        code = lost.process.exitcode
        how = "" if code is None else f" with code {code}"
        return RemoteEngineError(f"the engine's process {lost.process.pid}{where} ended{how}")

    def close(self) -> None:
        """Have all end, and with them what is unfinished."""
        self._is_closing = True
        self._pipes[0].tell(Stop())
        deadline = time.monotonic() + _EXIT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
        for pipe in self._pipes:
            pipe.close()

    def _find_lost(self) -> Launched:
        """The one that has ended, or is about to; of several who did not merely follow another."""
        deadline = time.monotonic() + _EXIT_CODE_S
        while self.is_alive and time.monotonic() < deadline:
            time.sleep(0.01)
        dead = [each for each in self._launched if not each.process.is_alive()]
        followed = [each for each in dead if each.process.exitcode == PARTED]
        return next((each for each in dead if each not in followed), (*dead, self._launched[0])[0])


class _OfAll:
    """One result of several calls: the first one's once all have theirs, or the first failure of
    any; that a member is lost, which those see who are still there, only where soon nothing else
    is known."""

    def __init__(self, results: Sequence[Future[Any]]) -> None:
        self.result = uncancelled()
        self._first, self._left = results[0], len(results)
        self._loss: BaseException | None = None
        self._lock = threading.Lock()
        for result in results:
            result.add_done_callback(self._note)

    def _note(self, done: Future[Any]) -> None:
        with self._lock:
            self._left -= 1
            error = done.exception()
            if isinstance(error, LostMemberError) and self._left:
                if self._loss is None:
                    self._loss = error
                    timer = threading.Timer(_EXIT_CODE_S, self._end, [error])
                    timer.daemon = True
                    timer.start()
                return
        if error is not None or not self._left:
            self._end(error if error is not None else self._loss)

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            if self.result.done():
                return
            if error is not None:
                self.result.set_exception(error)
            else:
                self.result.set_result(self._first.result())
