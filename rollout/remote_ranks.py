"""The processes of an engine apart, as its caller sees them: its tensor parallel ranks, or one.

Each has a connection. What is drawn is asked of rank 0, which leads the others step by step; what
changes weights or memory is sent to all, who do it when rank 0 does. They live and die together.
"""

import itertools
import logging
import multiprocessing
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from samebit.rollout.client import Tell
from samebit.rollout.engine_process import PARTED, START, serve_parent
from samebit.rollout.messages import (
    Answer,
    Ask,
    Beat,
    Done,
    Draw,
    Drew,
    Ended,
    Failed,
    Meet,
    Message,
    Stop,
)
from samebit.rollout.runtime.call import uncancelled
from samebit.rollout.wire import Wire, packed
from samebit.weight_sync.failures import CrashError
from samebit.weight_sync.meeting import LOOPBACK, host_store, listener_at
from samebit.weight_sync.types import LostMemberError

logger = logging.getLogger(__name__)

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


type Settle = Callable[[int, Done | Failed | Ended], object]
"""It is called with a call's number and answer, in the thread that reads all answers, which it must
not hold up; with the death of the process where there was no other answer. Of what Draw began also
with START and Ended."""
type Launcher = Callable[[str, int, dict[str, Any], int], Sequence[Launched]]
"""Starts so many processes of one machine, the ranks of an engine, each of which calls
engine_process.serve with a connection and these arguments."""


new_number = itertools.count(START + 1).__next__
"""The number of a call, to whichever engine."""


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
    """Sends one rank's calls, each with a number, and gives the answers to who waits for them.

    `started` is the first answer: whether the engine could be made.
    """

    def __init__(self, launched: Launched, death: Callable[[], RemoteEngineError]) -> None:
        """death: asked at the end of the process, which has come or is at hand: what to say."""
        self._process, self._death = launched.process, death
        self._lock = threading.Lock()  # of who waits
        self.started = uncancelled()
        self._waiting: dict[int, tuple[Settle, Tell | None]] = {
            START: (_settling(self.started), None)
        }
        self._ended = threading.Event()
        self._over: SimpleQueue[Exception | None] = SimpleQueue()
        threading.Thread(target=self._bury, name="samebit end", daemon=True).start()
        self._wire = Wire(launched.connection, lambda told: self._take(*told), self._over.put)

    def call(self, number: int, message: Message, tell: Tell | None = None) -> Future[Any]:
        """A call's result to come. RemoteEngineError if the process has died."""
        result = uncancelled()
        self.begin([number], packed((number, message)), _settling(result), tell)
        return result

    def begin(
        self, numbers: Iterable[int], message: bytes, settle: Settle, tell: Tell | None = None
    ) -> None:
        """Send what begins calls of these numbers. RemoteEngineError if the process has died."""
        with self._lock:
            if not (ended := self._ended.is_set()):
                self._waiting.update(dict.fromkeys(numbers, (settle, tell)))
        if ended:
            raise self._death()
        self._wire.send(message)

    def tell(self, message: Meet | Stop) -> None:
        """Send what has no answer of its own, to a process that may have ended."""
        self._wire.send(packed((START, message)))

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat or answer; 0 while there is one that is not read here."""
        return self._wire.silent_s

    def close(self) -> None:
        if not self._ended.wait(timeout=_EXIT_CODE_S):
            self._over.put(None)  # nothing was heard of the end
        self._wire.close()

    def _bury(self) -> None:
        """Once the connection has ended, so has the process, or it is made to. That may take long:
        it is another thread's."""
        unreadable = self._over.get()
        if unreadable is not None:
            self._process.kill()
        death = self._death()
        death.__cause__ = unreadable
        with self._lock:
            self._ended.set()
            waiting, self._waiting = self._waiting, {}
        for number, (settle, _) in waiting.items():
            try:
                settle(number, Failed(death))
            except Exception:  # the others are told, too
                logger.exception("who waits for an engine that died could not be told")

    def _take(self, number: int, answer: Answer) -> None:
        if isinstance(answer, Beat):
            return
        if isinstance(answer, Ended):  # of calls that one caller of Draw waits for
            callers = filter(None, map(self._waiting.get, answer.num_samples))
            if (caller := next(callers, None)) is not None:
                caller[0](START, answer)
            return
        if (waiting := self._waiting.get(number)) is None:
            return  # it was answered before
        settle, tell = waiting
        if isinstance(answer, Drew):
            assert tell is not None
            tell(answer.increments)
            return
        self._waiting.pop(number, None)
        settle(number, answer)


def _settling(result: Future[Any]) -> Settle:
    def settle(_: int, answer: Done | Failed | Ended) -> None:
        match answer:
            case Done(value):
                result.set_result(value)
            case Failed(error):
                result.set_exception(error)

    return settle


class EngineRanks:
    """All processes of one engine. One that ends by itself takes the others along: what is left of
    the engine would wait for it."""

    def __init__(self, launched: Sequence[Launched]) -> None:
        self.processes = [each.process for each in launched]
        self.address = launched[0].address
        self._launched = launched
        self._obituary = ""
        self._burying = threading.Lock()
        self._is_closing = False
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
        number = new_number()
        if not isinstance(message, Ask) or not others:
            return number, first.call(number, message, tell)
        with self._sending:
            # Rank 0 last: once it has it, the others will find it.
            results = [pipe.call(number, message) for pipe in others]
            results.insert(0, first.call(number, message, tell))
        return number, _OfAll(results).result

    def draw(self, message: Draw, settle: Settle) -> None:
        """Begin the calls of a message. RemoteEngineError if a process has died."""
        self._pipes[0].begin(message.requests, packed((START, message)), settle)

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
            if not self._obituary:
                self._obituary = self._end_all(self._find_lost())
        return RemoteEngineError(self._obituary)

    def _end_all(self, lost: Launched) -> str:
        """End what is left; what to say of the one that is lost."""
        for process in () if self._is_closing else self.processes:
            if process is not lost.process or process.is_alive():
                process.kill()
                process.join(_EXIT_CODE_S)
        where = f" on {lost.node}" if lost.node else ""
        code = lost.process.exitcode
        how = "" if code is None else f" with code {code}"
        return f"the engine's process {lost.process.pid}{where} ended{how}"

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
