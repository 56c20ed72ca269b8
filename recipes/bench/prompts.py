"""Requests of the benchmarks: random prompts that never come twice."""

import itertools
import time

import torch

from samebit.recipes.bench.config import Workload
from samebit.recipes.bench.output import BenchError
from samebit.rollout.client import EngineClient
from samebit.rollout.types import SamplingParams


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
