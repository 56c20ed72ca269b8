"""The critic's part of a training step: values of what was drawn, optimizer steps, figures."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from samebit.recipes.config import GrpoRun
from samebit.recipes.data.rewards import Poll
from samebit.recipes.run.batches import own_micro_batches, rows_by_sample
from samebit.trainer.megatron.critic import MegatronCritic
from samebit.trainer.types import MicroBatch, NonFiniteError, Sample, StepStats


class CriticUpdates:
    """Trains a run's critic on the samples that the policy is trained on."""

    def __init__(self, run: GrpoRun, critic: MegatronCritic) -> None:
        self._run, self._critic = run, critic
        self.stats: list[StepStats] = []
        """Of the latest training step."""
        self.metrics: dict[str, float] = {}
        """Of the same, by the names that are logged."""

    def with_values(self, groups: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
        """Return the samples with the values of the present critic, the same on every rank.

        Raises NonFiniteError, naming the sample, for a value that is NaN or infinite.
        """
        batches = self._packed([sample for group in groups for sample in group])
        values = rows_by_sample(batches, self._critic.values(batches))
        for sample_id, found in values.items():
            if not np.isfinite(found).all():
                raise NonFiniteError(
                    f"the critic: a value of sample {sample_id} is NaN or Inf; the weights are "
                    "unchanged"
                )
        return [
            [replace(s, values=s.in_place(values[s.sample_id], "values")) for s in group]
            for group in groups
        ]

    def train(self, samples: Sequence[Sample], poll: Poll | None = None) -> None:
        """Take as many optimizer steps as the policy does, on the same samples.

        `poll` is called as long as nothing is written; what it raises drops the step.
        """
        size = self._run.batch_size
        parts = [self._packed(samples[i : i + size]) for i in range(0, len(samples), size)]
        self.stats = []
        for batches in parts:
            self.stats.append(self._critic.learn(batches, None if self.stats else poll))
        self.metrics = critic_metrics(samples, self.stats)

    def _packed(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """Micro-batches of this data rank, of which nobody reads a log-prob."""
        plain = [replace(sample, logprobs=None, thresholds=None) for sample in samples]
        return own_micro_batches(plain, self._run.trainer, self._critic)


def critic_metrics(samples: Sequence[Sample], stats: Sequence[StepStats]) -> dict[str, float]:
    """Return the figures of a training step, of tokens that are trained on, by verl's names.

    vf_explained_var is 1 - Var(returns - values) / Var(returns), of the values before the step; it
    is left out where all returns are equal.
    """
    pairs = [(s.values, s.returns, s.loss_mask) for s in samples]
    known = [(v[mask], r[mask]) for v, r, mask in pairs if v is not None and r is not None]
    values, returns = (np.concatenate(x).astype(np.float64) for x in zip(*known, strict=True))
    found = {
        "critic/vf_loss": _mean([s.loss for s in stats]),
        "critic/grad_norm": _mean([s.grad_norm for s in stats]),
        "critic/lr": stats[-1].learning_rate,
        **{name: _mean([s.metrics[name] for s in stats]) for name in stats[0].metrics},
    }
    for name, each in (("values", values), ("returns", returns)):
        figures = {"mean": each.mean(), "max": each.max(), "min": each.min()}
        found |= {f"critic/{name}/{kind}": float(x) for kind, x in figures.items()}
    if (spread := returns.var()) > 0:
        found["critic/vf_explained_var"] = float(1 - (returns - values).var() / spread)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
