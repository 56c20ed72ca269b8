"""An engine apart from a trainer of several processes: the first calls it, and tells the others."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from samebit.kernels.memory import TagBytes
from samebit.kernels.top_tokens import TopTokens
from samebit.recipes.data.conversation import Response
from samebit.recipes.launch.replicas import completion_of_plain, completion_to_plain
from samebit.rollout.client import EngineClient, Progress
from samebit.rollout.remote_ranks import RemoteEngineError
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.types import Completion, Increment, SamplingParams
from samebit.trainer.megatron.setup import TIMEOUT
from samebit.trainer.ranks import begin_of_thread
from samebit.weight_sync.failures import may_pass
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.types import WeightVersion


class LedEngineError(RuntimeError):
    """The first process's call of the engine failed; the message is its own."""


class LedEngine:
    """An EngineClient of several processes for one engine, or a pool of them, that the first has.

    Every process makes the same calls, in the same order; all get the same result, or an error.
    `progress` is told on the first alone. Calls of asyncio run one after another, to their end.
    """

    def __init__(self, engine: EngineClient | None) -> None:
        """engine: the first process's; None on the others."""
        self.engine = engine
        # asyncio's calls; their threads gather by a group of their own, beside the main ones.
        self._in_order = ThreadPoolExecutor(1, initializer=begin_of_thread(TIMEOUT))

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Complete all prompts; see Engine.generate."""
        arguments = prompt_ids, sampling_params, sample_ids
        more: Any = {"return_hidden_states": return_hidden_states, "progress": progress}
        return _groups(self._told(lambda engine: _to_plain(engine.generate(*arguments, **more))))

    async def agenerate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
    ) -> list[list[Completion]]:
        """Complete all prompts; see Engine.agenerate."""
        arguments = prompt_ids, sampling_params, sample_ids
        more: Any = {"return_hidden_states": return_hidden_states}

        def draw(engine: EngineClient) -> list[list[dict[str, Any]]]:
            return _to_plain(asyncio.run(engine.agenerate(*arguments, **more)))

        loop = asyncio.get_running_loop()
        return _groups(await loop.run_in_executor(self._in_order, self._told, draw))

    async def stream(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
    ) -> AsyncGenerator[Increment, None]:
        """See Engine.stream; an increment is a whole sample, once all are drawn."""
        for group in await self.agenerate(prompt_ids, sampling_params, sample_ids):
            for c in group:
                yield c.as_increment()

    def score(
        self, token_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Score all sequences; see Engine.score."""
        return self._told(lambda engine: engine.score(token_ids, temperature))

    def score_top(
        self, token_ids: Sequence[Sequence[int]], k: int, temperature: float = 1.0
    ) -> list[tuple[list[float], TopTokens]]:
        """Score all sequences; see Engine.score_top."""

        def rate(engine: EngineClient) -> list[Any]:
            found = engine.score_top(token_ids, k, temperature)
            return [(logprobs, vars(top)) for logprobs, top in found]

        return [(logprobs, TopTokens(**top)) for logprobs, top in self._told(rate)]

    def abort_request(self, request_id: str) -> list[Completion]:
        """See Engine.abort_request. Between calls nothing is unfinished."""
        [group] = _groups(self._told(lambda engine: _to_plain([engine.abort_request(request_id)])))
        return group

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the weights that are served."""

        def ask(engine: EngineClient) -> tuple[int, str]:
            return engine.weight_version.step, engine.weight_version.digest

        return WeightVersion(*self._told(ask))

    @property
    def accept_lengths(self) -> AcceptLengths | None:
        """See Engine.accept_lengths."""

        def ask(engine: EngineClient) -> dict[str, Any] | None:
            return None if (found := engine.accept_lengths) is None else vars(found)

        told = self._told(ask)
        return None if told is None else AcceptLengths(**told)

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """See Engine.update_weights_from_disk."""

        def load(engine: EngineClient) -> tuple[int, str]:
            version = engine.update_weights_from_disk(model_path, step)
            return version.step, version.digest

        return WeightVersion(*self._told(load))

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        self._told(lambda engine: engine.flush_cache())

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """See Engine.release_memory_occupation."""
        return self._told(lambda engine: engine.release_memory_occupation(tags))

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """See Engine.resume_memory_occupation."""
        return self._told(lambda engine: engine.resume_memory_occupation(tags))

    def memory_occupation(self) -> dict[str, TagBytes]:
        """See Engine.memory_occupation."""

        def ask(engine: EngineClient) -> dict[str, tuple[int, ...]]:
            return {tag: tuple(taken) for tag, taken in engine.memory_occupation().items()}

        return {tag: TagBytes(*taken) for tag, taken in self._told(ask).items()}

    def shared[T](
        self,
        items: Sequence[T],
        work: Callable[[EngineClient, Sequence[T]], list[Response]],
        error_type: type[Exception],
    ) -> list[Response]:
        """Have the first process do `work` on the items with its engine; all get all, in order.

        Where it fails there, the other processes raise its error as `told` does.
        """

        def draw(engine: EngineClient) -> list[dict[str, Any]]:
            return [completion_to_plain(response) for response in work(engine, items)]

        return [completion_of_plain(c, Response) for c in self._told(draw, error_type)]

    def close(self) -> None:
        """Let go of the engine. No other process has to take part."""
        self._in_order.shutdown()
        if self.engine is not None:
            self.engine.close()

    def _told[T](
        self, call: Callable[[EngineClient], T], error_type: type[Exception] = LedEngineError
    ) -> T:
        return told(None if self.engine is None else partial(call, self.engine), error_type)


def told[T](call: Callable[[], T] | None, error_type: type[Exception] = LedEngineError) -> T:
    """Return what the first process's call gives, a plain value, on all; the others give None.

    What it raises there the others raise as a RemoteEngineError where starting again may help, else
    as error_type: whichever of them is seen to end first, max_restarts counts the same.
    """
    result: T | None = None
    failure: BaseException | None = None
    if call is not None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - the others are told first
            failure = error
    said = "" if failure is None else str(failure) or repr(failure)
    outcome = said, failure is not None and may_pass(failure), result
    said, passes, first = gather_objects(outcome)[0]
    if failure is not None:
        raise failure
    if said:
        raise (RemoteEngineError if passes else error_type)(said)
    return first  # type: ignore[return-value]


def _to_plain(groups: Sequence[Sequence[Completion]]) -> list[list[dict[str, Any]]]:
    return [[completion_to_plain(completion) for completion in group] for group in groups]


def _groups(plain: list[list[dict[str, Any]]]) -> list[list[Completion]]:
    return [[completion_of_plain(c, Completion) for c in group] for group in plain]
