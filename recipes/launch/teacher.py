"""The teacher of a run: an engine beside the policy's, which says how likely it finds samples."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from samebit.recipes.config import GrpoRun
from samebit.recipes.launch.replicas import ReplicatedEngine
from samebit.rollout.client import EngineClient
from samebit.rollout.engine import Engine
from samebit.trainer.algorithms.registry import make_algorithm
from samebit.trainer.checkpoint import CheckpointError
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import place
from samebit.trainer.types import Sample


class Teacher:
    """Holds the teacher's weights in every process that shares them, as the policy's engine does.

    It is made before that engine, which may then have most of what is left of a GPU.
    """

    def __init__(self, run: GrpoRun, trainer: MegatronTrainer) -> None:
        assert run.distillation is not None
        self._folder = run.distillation.teacher
        config, longest = run.distillation.engine, run.rollout.longest
        own: dict[str, Any] = {"attention": run.numerics.attention, "releasable": False}
        own |= {"model_family": run.model_family, "cuda_graphs": False, "seed": run.seed}
        if config.kv_cache_tokens is None and config.kv_memory_fraction is None:
            tokens = 2 * max(longest, config.max_batch_tokens)
            own["kv_cache_tokens"] = -(-tokens // config.page_size) * config.page_size
        config = replace(config, max_model_len=longest, **own)
        ranks = trainer.ranks
        engine = Engine(self._folder, config, device=trainer.device, ranks=ranks)
        self._engine: EngineClient = engine
        if run.num_processes > 1:
            self._engine = ReplicatedEngine(engine, *place(), ranks.size)
        self._temperature = run.rollout.temperature
        self._top_k = make_algorithm(run.algorithm).teacher_top_k
        self.digest = engine.weight_version.digest
        self.metrics: dict[str, float] = {}
        """Of the latest training step, by the names that are logged."""

    def require(self, digest: str) -> None:
        """Raise CheckpointError unless a run that is to go on had a teacher of this digest."""
        if digest != self.digest:
            raise CheckpointError(
                f"the run had a teacher of digest {digest}; that of "
                f"distillation.teacher={self._folder} is {self.digest}"
            )

    def with_logprobs(self, groups: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
        """Return the samples with the teacher's log-probs of their tokens, and its likeliest tokens
        if the algorithm asks for them; the same on every rank.

        They are of the rollout's temperature, as the policy's are.
        """
        samples = [sample for group in groups for sample in group]
        contexts = [sample.token_ids.tolist() for sample in samples]
        if self._top_k:
            found = self._engine.score_top(contexts, self._top_k, self._temperature)
            scores = [logprobs for logprobs, _ in found]
            trained = [torch.from_numpy(sample.loss_mask[1:]) for sample in samples]
            tops = [top.select(rows) for (_, top), rows in zip(found, trained, strict=True)]
            samples = [replace(s, teacher_top=top) for s, top in zip(samples, tops, strict=True)]
        else:
            scores = self._engine.score(contexts, self._temperature)
        scored = [
            replace(sample, teacher_logprobs=np.array([0.0, *found], np.float32))
            for sample, found in zip(samples, scores, strict=True)
        ]
        self.metrics = {"distillation/reverse_kl": reverse_kl(scored)}
        rest = iter(scored)
        return [[next(rest) for _ in group] for group in groups]

    def close(self) -> None:
        """Let go of the engine."""
        self._engine.close()


def reverse_kl(samples: Sequence[Sample]) -> float:
    """Return the mean of log(policy / teacher) over the drawn tokens, in nats."""
    pairs = [(s.logprobs, s.teacher_logprobs, s.loss_mask) for s in samples]
    found = [(a - b)[mask] for a, b, mask in pairs if a is not None and b is not None]
    return float(np.concatenate(found).mean(dtype=np.float64))
