"""Requests of the benchmarks: random prompts that never come twice."""

import itertools
import time
from dataclasses import dataclass
from typing import Self

import torch

from samebit.recipes.bench.config import Workload
from samebit.recipes.bench.output import BenchError
from samebit.rollout.client import EngineClient
from samebit.rollout.types import SamplingParams

type Outcome = tuple[tuple[int, ...], tuple[float, ...]]
"""Tokens of a completion and their log-probs."""


class PromptSource:
    """Draws prompts of random tokens, so that no run finds another's prefix in the cache."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(seed)
        self._sample_ids = itertools.count()

    def draw(self, workload: Workload) -> tuple[list[list[int]], list[list[int]]]:
        """(prompts, sample ids of each) of one run."""
        shape = (workload.num_prompts, workload.input_len)
        prompts = torch.randint(self._vocab_size, shape, generator=self._generator).tolist()
        ids = [list(itertools.islice(self._sample_ids, workload.num_samples)) for _ in prompts]
        return prompts, ids


def sampling_params(workload: Workload) -> SamplingParams:
    """Temperature 1, log-probs, and exactly output_len tokens."""
    return SamplingParams(
        n=workload.num_samples,
        temperature=1.0,
        max_new_tokens=workload.output_len,
        ignore_eos=True,
        logprobs=True,
    )


@dataclass(frozen=True)
class FixedPrompts:
    """Requests that are made again and again, and have to be answered by the same bits."""

    prompt_ids: list[list[int]]
    sample_ids: list[list[int]]
    params: SamplingParams

    @classmethod
    def of(cls, source: PromptSource, workload: Workload) -> Self:
        """A workload's next requests."""
        return cls(*source.draw(workload), sampling_params(workload))

    def outcomes(self, engine: EngineClient) -> list[Outcome]:
        """What an engine answers."""
        groups = engine.generate(self.prompt_ids, self.params, self.sample_ids)
        return [(tuple(c.token_ids), tuple(c.logprobs)) for group in groups for c in group]

    def require_same(self, engine: EngineClient, truth: list[Outcome], when: str) -> int:
        """BenchError unless the engine answers by these bits; how many tokens they were."""
        found = self.outcomes(engine)
        if apart := sum(a != b for a, b in zip(found, truth, strict=True)):
            raise BenchError(f"{when}: {apart} of {len(truth)} completions are not those before")
        return sum(len(tokens) for tokens, _ in found)


def timed_run(engine: EngineClient, source: PromptSource, workload: Workload) -> float:
    """Seconds of one run with fresh prompts; BenchError unless every token and log-prob came."""
    prompts, sample_ids = source.draw(workload)
    params = sampling_params(workload)
    start = time.perf_counter()
    groups = engine.generate(prompts, params, sample_ids)
    seconds = time.perf_counter() - start
    counts = [(len(c.token_ids), len(c.logprobs)) for group in groups for c in group]
    if counts != [(workload.output_len, workload.output_len)] * workload.num_seqs:
        raise BenchError(f"{workload}: the engine returned other numbers of tokens: {set(counts)}")
    return seconds
