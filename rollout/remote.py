"""An engine in a process of its own, or in one for each tensor parallel rank, called like one in
this process.

Connections carry typed messages (messages.py), each with the number of its call; so any thread and
any asyncio task may call while other calls are unfinished. The processes are children on this
machine, or whatever else a Launcher starts, on another one (remote_ranks.py).
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from functools import partial, wraps
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Concatenate

from torch import Tensor

from samebit.kernels.top_tokens import TopTokens
from samebit.rollout.client import Begun, Progress, Tell, awaited, result_of, stream_of
from samebit.rollout.engine import Engine
from samebit.rollout.messages import Abandon, Ask, Draw, Generate, LeaveOff, Message, Score
from samebit.rollout.remote_ranks import (
    EngineRanks,
    Launcher,
    RemoteEngineError,
    Settle,
    launch_here,
)
from samebit.rollout.runtime.requests import scores_of, top_scores_of
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.types import Completion, Increment, Request, SamplingParams
from samebit.rollout.values import as_integer
from samebit.weight_sync.types import WeightVersion


def _asking[**P, T](
    method: Callable[Concatenate[Engine, P], T],
) -> Callable[Concatenate["RemoteEngine", P], T]:
    """A method that has the engine do this one of its own, which takes no steps, on all ranks."""

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


def _as_count(value: int, name: str) -> int:
    if (count := as_integer(value, f"RemoteEngine {name}")) < 1:
        raise ValueError(f"RemoteEngine {name} is {count}; it must be positive")
    return count


class RemoteEngine:
    """An EngineClient: starts a process with an Engine, or as many as there are tensor parallel
    ranks; arguments as Engine's.

    Close it when done. Any method raises RemoteEngineError once a process of it has died. Raises
    ValueError for cpu_threads or num_ranks below 1, and what Engine and the launcher raise.
    """

    def __init__(
        self,
        model_path: str | Path,
        cpu_threads: int = 1,
        launch: Launcher = launch_here,
        num_ranks: int = 1,
        waits: bool = True,
        **settings: Any,
    ) -> None:
        """cpu_threads: of each process. num_ranks: processes that share every layer; whether their
        bits are those of other numbers, the setting `ranks` says by its `invariant`. waits: until
        the engine is made; else `wait_started` has to be called before anything else."""
        cpu_threads = _as_count(cpu_threads, "cpu_threads")
        self.num_ranks = num_ranks = _as_count(num_ranks, "num_ranks")
        """Tensor parallel ranks; each is a member of a weight group."""
        launched = launch(str(model_path), cpu_threads, settings, num_ranks)
        self._ranks = EngineRanks(launched)
        Finalize(self, self._ranks.kill, exitpriority=1)  # for those who do not close it
        try:
            self._ranks.start()
        except BaseException:
            self._ranks.kill()
            raise
        if waits:
            self.wait_started()

    def wait_started(self) -> None:
        """Wait until the engine is made. Raises what Engine does, and ends the processes then."""
        try:
            self._ranks.started.result()
        except BaseException:
            self._ranks.kill()
            raise

    @property
    def address(self) -> str:
        """This machine, as the engine's processes reach it."""
        return self._ranks.address

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
            progress(len(done), sum(c.num_tokens for c in done))
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

    def draw(self, requests: Mapping[int, Sequence[Request]], settle: Settle) -> None:
        """Begin to complete requests of a RequestFactory with this engine's `limits`: those of a
        `new_number` are a call, answered by all their completions.

        Whoever calls this gives all request ids; `generate` and the like give others of their own.
        """
        self._ranks.draw(Draw(requests), settle)

    def abandon(self, number: int) -> Future[Any]:
        """Have it abort a call; it is told when that is done."""
        return self._ranks.call(Abandon(number))[1]

    def leave_off(self, numbers: Sequence[int]) -> Future[Any]:
        """Have it abort those of its calls that another engine had better go on with; it is told
        when those are answered."""
        return self._ranks.call(LeaveOff(numbers))[1]

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
    abort_weight_update = _asking(Engine.abort_weight_update)
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
        """Whether all of its processes are there."""
        return self._ranks.is_alive

    @property
    def silent_s(self) -> float:
        """Seconds since the engine was last heard of between two steps, or idle: once a second."""
        return self._ranks.silent_s

    def kill(self) -> None:
        """End its processes at once; who waits for them gets a RemoteEngineError."""
        self._ranks.kill()

    def death(self) -> RemoteEngineError:
        """What callers of an engine are told of which a process has died; all have ended then."""
        return self._ranks.death()

    def close(self) -> None:
        """End its processes, and with them what is unfinished."""
        self._ranks.close()

    def _call(self, message: Message, progress: Progress | None = None) -> Any:
        """A call's result; progress knows of no tokens before."""
        tell = None if progress is None else partial(progress, 0, 0)
        return awaited(self._begin(message), tell)

    def _begin(self, message: Message, tell: Tell | None = None) -> Begun[Any]:
        number, result = self._ranks.call(message, tell)
        return result, partial(self.abandon, number)
