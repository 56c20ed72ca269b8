"""Settings of a critic: the section `critic` of runs whose algorithm has one. No torch here."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from samebit.trainer.config import OptimizerConfig, ParallelConfig, require


@dataclass(kw_only=True)
class CriticOptimizerConfig(OptimizerConfig):
    """The critic's own."""

    key: ClassVar[str] = "critic.optimizer"

    lr: float = 1e-5
    """Learning rate, after the warm-up."""


@dataclass(kw_only=True)
class CriticLayout(ParallelConfig):
    """How a critic is spread."""

    key: ClassVar[str] = "critic.parallel"


@dataclass(kw_only=True)
class CriticParallelConfig:
    """A critic's layout in its policy's processes. What is unset is as in trainer.parallel."""

    tensor: int | None = None
    sequence: bool | None = None
    pipeline: int | None = None
    virtual_pipeline: int | None = None
    context: int | None = None
    data: int | None = None
    distributed_optimizer: bool | None = None
    offload_optimizer: bool | None = None
    overlap_grad_reduce: bool | None = None
    recompute: str | None = None

    def beside(self, policy: ParallelConfig) -> ParallelConfig:
        """Return the layout of the critic of a policy in this one.

        Raises ValueError for one that cannot be, or not in as many processes.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        layout = CriticLayout(**{name: getattr(policy, name) for name in vars(self)} | given)
        size = policy.num_processes
        meaning = f"of {size} processes, as trainer.parallel is; what is unset is as there"
        found = f"{layout} = {layout.num_processes}"
        require(layout.num_processes == size, layout.key, found, meaning)
        return layout


@dataclass(kw_only=True)
class CriticConfig:
    """The critic: a model that says what the rest of a sample is worth, at every token.

    It lives in the policy's processes.
    """

    model: str | None = None
    """A Hugging Face folder to start from, of the policy's family and vocabulary; unset:
    model.path. Its value head, if it has one (architectures: ...ForTokenClassification or
    ...ForSequenceClassification, with one label), is the critic's; else that begins with zeros."""
    warmup_steps: int = 0
    """Training steps in which the critic alone learns, and the policy waits."""
    cliprange_value: float = 0.5
    """Within an optimizer step a value counts as far as this from what it was in the rollout; 0:
    without a bound."""
    vf_coef: float = 0.5
    """Weight of the squared error."""
    optimizer: CriticOptimizerConfig = field(default_factory=CriticOptimizerConfig)
    parallel: CriticParallelConfig = field(default_factory=CriticParallelConfig)
    """How it is spread over the policy's processes; what is unset is as in trainer.parallel."""

    def __post_init__(self) -> None:
        require(self.model != "", "critic.model", self.model, "the path of a folder, or unset")
        require(self.warmup_steps >= 0, "critic.warmup_steps", self.warmup_steps, "at least 0")
        clip = self.cliprange_value
        require(0 <= clip < math.inf, "critic.cliprange_value", clip, "finite and at least 0")
        fits = 0 < self.vf_coef < math.inf
        require(fits, "critic.vf_coef", self.vf_coef, "positive and finite")
