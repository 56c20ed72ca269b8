"""An engine in a process of its own, called like one in this process.

A connection carries typed messages (messages.py), each with the number of its call; so any thread
and any asyncio task may call while other calls are unfinished. The process is a child on this
machine, or whatever else a Launcher starts, on another one.
"""

import itertools
import multiprocessing
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial, wraps
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Concatenate, Protocol

from torch import Tensor

from samebit.kernels.top_tokens import TopTokens
from samebit.rollout.client import Begun, Progress, Tell, awaited, result_of, stream_of
from samebit.rollout.engine import Engine
from samebit.rollout.engine_process import START, serve_parent
from samebit.rollout.messages import (
    Abandon,
    Answer,
    Ask,
    Beat,
    Done,
    Draw,
    Drew,
    Generate,
    Message,
    Score,
    Stop,
)
from samebit.rollout.runtime.call import uncancelled
from samebit.rollout.runtime.requests import scores_of, top_scores_of
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.types import Completion, Increment, Request, SamplingParams
from samebit.rollout.values import as_integer
from samebit.weight_sync.failures import CrashError
from samebit.weight_sync.meeting import LOOPBACK
from samebit.weight_sync.types import WeightVersion

# A child has nothing of this process, of a GPU's context least of all.
CONTEXT = multiprocessing.get_context("spawn")
_EXIT_S = 60.0  # how long a process may take to end that is told to, on a busy machine
_EXIT_CODE_S = 5.0  # how long a process may take to end after its end of the pipe


class RemoteEngineError(CrashError):
    """The engine's process died."""


class EngineProcess(Protocol):
    """The process that an engine is in, as this one sees it; multiprocessing's are such."""

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


type Launcher = Callable[[str, int, dict[str, Any]], Launched]
"""Starts a process that calls engine_process.serve with a connection and these arguments."""


def launch_here(model_path: str, cpu_threads: int, settings: dict[str, Any]) -> Launched:
    """The Launcher of a child process."""
    connection, child = CONTEXT.Pipe()
    arguments = child, model_path, cpu_threads, settings
    process = CONTEXT.Process(target=serve_parent, args=arguments, daemon=True)
    process.start()
    child.close()
    return Launched(process, connection)


class _Pipe:
    """Sends calls, each with a number; a thread gives the answers to those who wait for them.

    `started` is the first answer: whether the engine could be made.
    """

    def __init__(self, launched: Launched) -> None:
        self._connection, self._process = launched.connection, launched.process
        self._node = launched.node
        self._heard_at = time.monotonic()
        self._lock = threading.Lock()  # of a call's registration and its message
        self._numbers = itertools.count(START + 1)
        self.started = uncancelled()
        self._waiting: dict[int, tuple[Future[Any], Tell | None]] = {START: (self.started, None)}
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="samebit answers", daemon=True)
        self._reader.start()

    def call(self, message: Message, tell: Tell | None = None) -> tuple[int, Future[Any]]:
        """A call's number and its result to come. RemoteEngineError if the process has died."""
        result = uncancelled()
        with self._lock:
            if self._ended:
                raise self.death()
            number = next(self._numbers)
            self._waiting[number] = (result, tell)
            try:
                self._connection.send((number, message))
            except BaseException as error:
                self._waiting.pop(number, None)
                if isinstance(error, OSError):
                    raise self.death() from error
                raise
        return number, result

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat; 0 while there is something that this end has not read."""
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
        death = self.death()
        death.__cause__ = unreadable
        for result, _ in self._waiting.values():
            result.set_exception(death)

    def _take(self, number: int, answer: Answer) -> None:
        if isinstance(answer, Beat):
            self._heard_at = time.monotonic()
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

    def death(self) -> RemoteEngineError:
        """What to say of the end of the process, which has come or is at hand."""
        deadline = time.monotonic() + _EXIT_CODE_S
        while self._process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        where = f" on {self._node}" if self._node else ""
        code = self._process.exitcode
        how = "" if code is None else f" with code {code}"
        return RemoteEngineError(f"the engine's process {self._process.pid}{where} ended{how}")


def _asking[**P, T](
    method: Callable[Concatenate[Engine, P], T],
) -> Callable[Concatenate["RemoteEngine", P], T]:
    """A method that has the process's engine do this one of its own, which takes no steps."""

    @wraps(method)
    def ask(remote: "RemoteEngine", *args: P.args, **kwargs: P.kwargs) -> T:
        return remote._call(Ask(method, args, kwargs))

    return ask


def _limits(engine: Engine) -> dict[str, Any]:
    own = fields(engine.requests)
    return {f.name: getattr(engine.requests, f.name) for f in own if not f.name.startswith("_")}


def _weight_version(engine: Engine) -> WeightVersion:
    return engine.weight_version


def _draft_version(engine: Engine) -> WeightVersion | None:
    return engine.draft_version


def _get_weights_by_name(engine: Engine, name: str, truncate_size: int | None = None) -> Tensor:
    """See Engine.get_weights_by_name; the copy is on the CPU."""
    return engine.get_weights_by_name(name, truncate_size).cpu()


def _is_paused(engine: Engine) -> bool:
    return engine.is_paused


def _accept_lengths(engine: Engine) -> AcceptLengths | None:
    return engine.accept_lengths


class RemoteEngine:
    """An EngineClient: starts a process with an Engine; arguments as Engine's.

    Close it when done. Any method raises RemoteEngineError once the process has died. Raises
    ValueError for cpu_threads below 1, and what Engine and the launcher raise.
    """

    def __init__(
        self,
        model_path: str | Path,
        cpu_threads: int = 1,
        launch: Launcher = launch_here,
        **settings: Any,
    ) -> None:
        cpu_threads = as_integer(cpu_threads, "RemoteEngine cpu_threads")
        if cpu_threads < 1:
            raise ValueError(f"RemoteEngine cpu_threads is {cpu_threads}; it must be positive")
        launched = launch(str(model_path), cpu_threads, settings)
        self.address = launched.address
        """This machine, as the engine's process reaches it."""
        self._process = launched.process
        Finalize(self, self._process.kill, exitpriority=1)  # for those who do not close it
        self._pipe = _Pipe(launched)
        self._pipe.started.result()

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See Engine.generate; progress knows of no tokens before the end."""
        message = Generate(prompt_ids, sampling_params, sample_ids, return_hidden_states)
        groups = self._call(message, progress)
        if progress is not None:
            done = [c for group in groups for c in group]
            progress(len(done), sum(len(c.token_ids) for c in done))
        return groups

    async def agenerate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
    ) -> list[list[Completion]]:
        arguments = prompt_ids, sampling_params, sample_ids, return_hidden_states
        return await result_of(*self._begin(Generate(*arguments, fresh_ids=True)))

    def stream(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
    ) -> AsyncGenerator[Increment, None]:
        """See Engine.stream; bad input is refused when the first increment is asked for."""
        prompts = prompt_ids, sampling_params, sample_ids
        message = Generate(*prompts, fresh_ids=True, streams=True)
        return stream_of(partial(self._begin, message))

    def draw(self, requests: Sequence[Request]) -> Begun[list[list[Completion]]]:
        """Begin to complete requests of a RequestFactory with this engine's `limits`.

        Whoever calls this gives all request ids; `generate` and the like give others of their own.
        """
        return self._begin(Draw(requests))

    def score(
        self, token_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        return scores_of(self._call(Score(token_ids, temperature)))

    def score_top(
        self, token_ids: Sequence[Sequence[int]], k: int, temperature: float = 1.0
    ) -> list[tuple[list[float], TopTokens]]:
        message = Score(token_ids, temperature, as_integer(k, "score_top k"))
        return top_scores_of(self._call(message))

    abort_request = _asking(Engine.abort_request)
    flush_cache = _asking(Engine.flush_cache)
    pause_generation = _asking(Engine.pause_generation)
    continue_generation = _asking(Engine.continue_generation)
    release_memory_occupation = _asking(Engine.release_memory_occupation)
    resume_memory_occupation = _asking(Engine.resume_memory_occupation)
    memory_occupation = _asking(Engine.memory_occupation)
    update_weights_from_disk = _asking(Engine.update_weights_from_disk)
    join_weight_transport = _asking(Engine.join_weight_transport)
    leave_weight_transport = _asking(Engine.leave_weight_transport)
    receive_weight_update = _asking(Engine.receive_weight_update)
    weight_report = _asking(Engine.weight_report)
    get_weights_by_name = _asking(_get_weights_by_name)
    begin_weight_update = _asking(Engine.begin_weight_update)
    end_weight_update = _asking(Engine.end_weight_update)
    init_weights_update_group = _asking(Engine.init_weights_update_group)
    destroy_weights_update_group = _asking(Engine.destroy_weights_update_group)
    update_weights_from_distributed = _asking(Engine.update_weights_from_distributed)
    update_weights_from_tensor = _asking(Engine.update_weights_from_tensor)

    def limits(self) -> dict[str, Any]:
        """What a RequestFactory has to know to check requests for this engine."""
        return _asking(_limits)(self)

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the weights that are served."""
        return _asking(_weight_version)(self)

    @property
    def draft_version(self) -> WeightVersion | None:
        """See Engine.draft_version."""
        return _asking(_draft_version)(self)

    @property
    def is_paused(self) -> bool:
        """Whether generation is paused."""
        return _asking(_is_paused)(self)

    @property
    def accept_lengths(self) -> AcceptLengths | None:
        """See Engine.accept_lengths."""
        return _asking(_accept_lengths)(self)

    @property
    def is_alive(self) -> bool:
        """Whether the process is there."""
        return self._process.is_alive()

    @property
    def silent_s(self) -> float:
        """Seconds since the engine was last heard of between two steps, or idle: once a second."""
        return self._pipe.silent_s

    def kill(self) -> None:
        """End the process at once; who waits for it gets a RemoteEngineError."""
        self._process.kill()

    def death(self) -> RemoteEngineError:
        """What callers of a process that has died are told."""
        return self._pipe.death()

    def close(self) -> None:
        """End the process, and with it what is unfinished."""
        with suppress(RemoteEngineError):
            self._pipe.call(Stop())
        self._process.join(_EXIT_S)
        if self._process.is_alive():
            self._process.kill()
        self._pipe.close()

    def _call(self, message: Message, progress: Progress | None = None) -> Any:
        """A call's result; progress knows of no tokens before."""
        tell = None if progress is None else partial(progress, 0, 0)
        return awaited(self._begin(message), tell)

    def _begin(self, message: Message, tell: Tell | None = None) -> Begun[Any]:
        number, result = self._pipe.call(message, tell)
        return result, lambda: self._pipe.call(Abandon(number))[1]
