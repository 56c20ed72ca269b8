"""Several copies of the engine as one: each completes its share of the prompts, all get all."""

import asyncio
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from samebit.kernels.memory import TagBytes
from samebit.kernels.top_tokens import TopTokens
from samebit.recipes.data.conversation import Response
from samebit.rollout.client import EngineClient, Progress
from samebit.rollout.engine import Engine
from samebit.rollout.request_client import RequestClient
from samebit.rollout.runtime.requests import RequestFactory
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.types import Completion, Increment, Request, SamplingParams
from samebit.trainer.ranks import together
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.types import VersionSpan, WeightVersion


class ReplicatedEngine(RequestClient):
    """An EngineClient for the engines of a run's processes; `tensor_size` neighbours are one copy.

    Every process makes the same calls, in the same order. What is drawn does not depend on who
    draws it. Progress is of this process's share. Calls of asyncio run one after another, and one
    that is cancelled runs to its end: the other processes take part in it.
    """

    def __init__(self, engine: Engine, rank: int, size: int, tensor_size: int) -> None:
        self._engine = engine
        self._rank, self._tensor_size = rank, tensor_size
        self._copy, self._num_copies = rank // tensor_size, size // tensor_size
        self._in_order = ThreadPoolExecutor(1)  # asyncio's calls, one after another

    @property
    def _requests(self) -> RequestFactory:
        return self._engine.requests

    async def stream(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
    ) -> AsyncGenerator[Increment, None]:
        """See Engine.stream; an increment is a whole sample, once all copies have drawn theirs."""
        for group in await self.agenerate(prompt_ids, sampling_params, sample_ids):
            for c in group:
                yield c.as_increment()

    def abort_request(self, request_id: str) -> list[Completion]:
        """See Engine.abort_request. Between calls nothing is unfinished: KeyError."""
        return self._engine.abort_request(request_id)

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the weights that are served."""
        return self._engine.weight_version

    @property
    def accept_lengths(self) -> AcceptLengths | None:
        """Those of all copies; every process asks."""
        own = self._engine.accept_lengths
        if own is None:
            return None
        copies = gather_objects(vars(own))[:: self._tensor_size]
        first, *others = (AcceptLengths(**counts) for counts in copies)
        return sum(others, first)

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """See Engine.update_weights_from_disk."""
        return self._engine.update_weights_from_disk(model_path, step)

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        self._engine.flush_cache()

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """See Engine.release_memory_occupation; the bytes are this process's."""
        return self._engine.release_memory_occupation(tags)

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """See Engine.resume_memory_occupation; the bytes are this process's."""
        return self._engine.resume_memory_occupation(tags)

    def memory_occupation(self) -> dict[str, TagBytes]:
        """See Engine.memory_occupation; it is this process's."""
        return self._engine.memory_occupation()

    def shared[T](
        self,
        items: Sequence[T],
        work: Callable[[EngineClient, Sequence[T]], list[Response]],
        error_type: type[Exception],
    ) -> list[Response]:
        """Have each copy do its share of the items with its engine; all get all, in order.

        `work` runs on a copy's first process, and calls its engine in any order. Where it fails,
        the other processes raise its error as error_type, or as a CrashError: see `together`.
        """
        own = items[self._copy :: self._num_copies]
        with together(error_type):
            if self._tensor_size == 1:
                drawn = work(self._engine, own)
            elif self._rank % self._tensor_size == 0:
                with self._engine.leading():
                    drawn = work(self._engine, own)
            else:
                self._engine.follow()
                drawn = []
        found: list[Response | None] = [None] * len(items)
        parts = gather_objects([completion_to_plain(response) for response in drawn])
        for copy, part in enumerate(parts[:: self._tensor_size]):
            found[copy :: self._num_copies] = [completion_of_plain(c, Response) for c in part]
        return [response for response in found if response is not None]

    def close(self) -> None:
        """Let go of the engine."""
        self._in_order.shutdown()
        self._engine.close()

    async def _adrawn(self, requests: Sequence[Request]) -> list[list[Completion]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._in_order, self._drawn, requests)

    def _drawn(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        """Groups of all requests, in order; each copy draws its share, and all get all.

        The requests were checked whole: what one process refuses, all do.
        """
        own = requests[self._copy :: self._num_copies]
        drawn = self._engine.loop.run(own, progress) if own else []
        plain = [[completion_to_plain(completion) for completion in group] for group in drawn]
        groups: list[list[Completion]] = [[] for _ in requests]
        for copy, part in enumerate(gather_objects(plain)[:: self._tensor_size]):
            groups[copy :: self._num_copies] = [
                [completion_of_plain(c, Completion) for c in group] for group in part
            ]
        return groups


def completion_to_plain(c: Completion) -> dict[str, Any]:
    """Return its fields as plain values: log-probs are exact fp32 values."""
    return {each.name: getattr(c, each.name) for each in fields(c)} | {
        "token_ids": array("i", c.token_ids),
        "logprobs": array("f", c.logprobs),
        "thresholds": array("f", c.thresholds),
        "version_spans": [
            (s.start, s.recomputed, s.version.step, s.version.digest) for s in c.version_spans
        ],
        "hidden_states": {layer: states.cpu() for layer, states in c.hidden_states.items()},
        "top_tokens": None if c.top_tokens is None else vars(c.top_tokens),
    }


def completion_of_plain[C: Completion](plain: dict[str, Any], kind: type[C]) -> C:
    """Return what completion_to_plain was made of."""
    spans, top = plain["version_spans"], plain["top_tokens"]
    found = {
        "top_tokens": None if top is None else TopTokens(**top),
        "token_ids": tuple(plain["token_ids"]),
        "logprobs": tuple(plain["logprobs"]),
        "thresholds": tuple(plain["thresholds"]),
        "version_spans": tuple(
            VersionSpan(start, WeightVersion(*version), recomputed)
            for start, recomputed, *version in spans
        ),
    }
    return kind(**plain | found)
