"""Several copies of the engine as one: each completes its share of the prompts, all get all."""

import asyncio
import itertools
from array import array
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from samebit.rollout.client import Progress
from samebit.rollout.engine import Engine
from samebit.rollout.types import Completion, Increment, SamplingParams
from samebit.rollout.values import MAX_UINT64
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.types import VersionSpan, WeightVersion


class ReplicatedEngine:
    """An EngineClient for the engines of a run's processes; `tensor_size` neighbours are one copy.

    Every process makes the same calls, in the same order. What is drawn does not depend on who
    draws it.
    """

    def __init__(self, engine: Engine, rank: int, size: int, tensor_size: int) -> None:
        self._engine = engine
        self._tensor_size = tensor_size
        self._copy, self._num_copies = rank // tensor_size, size // tensor_size
        self._fresh_ids = itertools.count(MAX_UINT64, -1)
        self._in_order = ThreadPoolExecutor(1)  # asyncio's calls, one after another

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Complete all prompts; see Engine.generate. Progress is of this process's share."""
        params = _per_prompt(sampling_params, len(prompt_ids))
        ids = _ids(params, itertools.count()) if sample_ids is None else sample_ids
        asked: dict[str, Any] = {"return_hidden_states": return_hidden_states, "progress": progress}

        def draw(own: slice) -> list[list[Any]]:
            groups = self._engine.generate(prompt_ids[own], params[own], ids[own], **asked)
            return [[_to_plain(completion) for completion in group] for group in groups]

        groups = self._share(len(prompt_ids), draw)
        return [[_completion(plain) for plain in group] for group in groups]

    async def agenerate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
    ) -> list[list[Completion]]:
        """Complete all prompts; see Engine.agenerate. Calls run one after another.

        One that is cancelled runs to its end: the other processes take part in it.
        """
        params = _per_prompt(sampling_params, len(prompt_ids))
        ids = _ids(params, self._fresh_ids) if sample_ids is None else sample_ids
        call = partial(
            self.generate, prompt_ids, params, ids, return_hidden_states=return_hidden_states
        )
        return await asyncio.get_running_loop().run_in_executor(self._in_order, call)

    async def stream(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
    ) -> AsyncGenerator[Increment, None]:
        """See Engine.stream; an increment is a whole sample, once all copies have drawn theirs."""
        for group in await self.agenerate(prompt_ids, sampling_params, sample_ids):
            for c in group:
                yield Increment(
                    request_id=c.request_id,
                    sample_id=c.sample_id,
                    token_ids=c.token_ids,
                    logprobs=c.logprobs,
                    finish_reason=c.finish_reason,
                    version_spans=c.version_spans,
                )

    def score(
        self, token_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Score all sequences; see Engine.score."""
        return self._share(
            len(token_ids), lambda own: self._engine.score(token_ids[own], temperature)
        )

    def abort_request(self, request_id: str) -> list[Completion]:
        """See Engine.abort_request. Between calls nothing is unfinished: KeyError."""
        return self._engine.abort_request(request_id)

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the weights that are served."""
        return self._engine.weight_version

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """See Engine.update_weights_from_disk."""
        return self._engine.update_weights_from_disk(model_path, step)

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        self._engine.flush_cache()

    def close(self) -> None:
        """Let go of the engine."""
        self._in_order.shutdown()
        self._engine.close()

    def _share[T](self, count: int, work: Callable[[slice], list[T]]) -> list[T]:
        """The results for `count` items, in order; each copy does its share, and all get all."""
        own = slice(self._copy, None, self._num_copies)
        done = work(own) if self._copy < count else []
        results: list[Any] = [None] * count
        for copy, part in enumerate(gather_objects(done)[:: self._tensor_size]):
            results[copy :: self._num_copies] = part
        return results


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    return params


def _ids(params: Sequence[SamplingParams], numbers: Iterable[int]) -> list[list[int]]:
    """As RequestFactory gives them, over all copies."""
    numbers = iter(numbers)
    return [list(itertools.islice(numbers, p.n)) for p in params]


def _to_plain(c: Completion) -> dict[str, Any]:
    """Its fields as plain values: log-probs are exact fp32 values."""
    return vars(c) | {
        "token_ids": array("i", c.token_ids),
        "logprobs": array("f", c.logprobs),
        "version_spans": [(s.start, s.version.step, s.version.digest) for s in c.version_spans],
        "hidden_states": {layer: states.cpu() for layer, states in c.hidden_states.items()},
    }


def _completion(plain: dict[str, Any]) -> Completion:
    spans = plain["version_spans"]
    found = {
        "token_ids": tuple(plain["token_ids"]),
        "logprobs": tuple(plain["logprobs"]),
        "version_spans": tuple(VersionSpan(n, WeightVersion(*version)) for n, *version in spans),
    }
    return Completion(**plain | found)
