"""What an algorithm is: rewards to advantages, and log-probs to a loss."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from samebit.kernels.reduce import ALONE, RankGroup
from samebit.trainer.algorithms.mistakes import naming_algorithm
from samebit.trainer.config import AlgorithmConfig
from samebit.trainer.context import in_rows, sample_sums
from samebit.trainer.types import MicroBatch, Sample

Advantages = Sequence[Sequence[float | np.ndarray]]
"""[prompts][samples]: one number for all of a sample's tokens, or one for each token [L]."""


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """A micro-batch's loss rows, as a loss reads them. A context rank has a part of them.

    What the rollout said of them stands in `batch`: log-probs, advantages, samples.
    """

    batch: MicroBatch
    logprobs: Tensor
    """[R] fp32, differentiable: log-probs of the target tokens under the present weights."""
    entropies: Tensor
    """[R] fp32 in nats; differentiable if the algorithm's needs_entropy_grad is set."""
    ref_logprobs: Tensor | None = None
    """[R] fp32: log-probs under the reference weights, if the trainer holds any."""
    teacher_kl: Tensor | None = None
    """[R] fp32, differentiable: the KL of the present distributions to the teacher's, over its
    likeliest tokens and the rest (kernels/top_tokens.py), if the algorithm asks for some."""
    context: RankGroup = ALONE

    @property
    def log_ratio(self) -> Tensor:
        """[R] log of the policy ratio, of the present weights to the rollout's; differentiable."""
        assert self.batch.rollout_logprobs is not None
        return self.logprobs - self.batch.rollout_logprobs

    def sample_sums(self, rows: Tensor) -> Tensor:
        """Sums of rows [R] by sample [B], of all context ranks: see context.sample_sums."""
        return sample_sums(rows, self.batch, self.context)

    def sample_means(self, rows: Tensor) -> Tensor:
        """sample_sums, divided by the samples' numbers of loss rows."""
        return self.sample_sums(rows) / self.batch.row_counts

    def in_rows(self, samples: Tensor) -> Tensor:
        """Values of samples [B] in each of their rows [R]; they are differentiable."""
        return in_rows(samples, self.batch)


@dataclass(frozen=True)
class LossOutputs:
    """What a loss finds for a micro-batch's rows."""

    losses: Tensor
    """[R], before any mean. The loss of a whole sample stands in each of its rows: with
    trainer.loss_mean=sequence it then counts once."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """[R] by the name that is logged, as the mean over all rows of an optimizer step."""


class Algorithm[C: AlgorithmConfig]:
    """An algorithm with its settings: advantages and loss, pure functions of what they are given.

    A new one is a subclass, which names the dataclass of its settings as Config, and a line in
    ALGORITHMS of trainer/algorithms/registry.py. See docs/extending.md.
    """

    Config: ClassVar[Any] = AlgorithmConfig
    needs_reference: bool = False
    """Whether the loss reads ref_logprobs: the weights at the run's start are then kept."""
    rewards_need_reference: bool = False
    """Whether `advantages` reads the samples' ref_logprobs: they are kept then too."""
    refresh_reference_every: int = 0
    """Training steps after which the present weights take their place; 0: never."""
    needs_values: bool = False
    """Whether `advantages` reads the samples' values: a critic is trained then, on `returns`, by
    the section `critic` that Config.sections has to name."""
    needs_teacher: bool = False
    """Whether `advantages` reads the samples' teacher_logprobs: of the teacher that the section
    `distillation` says, which Config.sections has to name."""
    teacher_top_k: int = 0
    """How many of the teacher's likeliest tokens the loss's teacher_kl is over; 0: none is made."""
    needs_entropy_grad: bool = False
    """Whether the loss differentiates the entropies: their gradient is then made."""

    def __init__(self, config: C | None = None) -> None:
        self.config: C = self.Config() if config is None else config

    @property
    def has_reference(self) -> bool:
        """Whether a reference is kept."""
        return self.needs_reference or self.rewards_need_reference

    def advantages(self, rewards: Tensor, groups: Sequence[Sequence[Sample]]) -> Advantages:
        """rewards [prompts, samples] fp64 of a training step's samples -> their advantages.

        `groups` [prompts][samples] are the samples, still without advantages.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no advantages of rewards")

    def returns(self, rewards: Tensor, groups: Sequence[Sequence[Sample]]) -> Advantages:
        """What a critic is to learn, of the same arguments: for each token."""
        raise NotImplementedError(f"{type(self).__name__} makes no returns of rewards")

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The loss of every row of a micro-batch, before weighting and averaging."""
        raise NotImplementedError

    def checked_loss(self, inputs: LossInputs) -> LossOutputs:
        """What `loss` finds; ValueError unless losses and metrics have a value for each row."""
        with naming_algorithm(self, "loss"):
            found = self.loss(inputs)
        count = len(inputs.logprobs)
        for name, values in ({"losses": found.losses} | found.metrics).items():
            if values.shape != (count,):
                raise ValueError(
                    f"{type(self).__name__}.loss returned {name} of shape {tuple(values.shape)} "
                    f"for {count} loss rows"
                )
        return found
