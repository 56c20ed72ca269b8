"""Settings of a critic: the section `critic` of runs whose algorithm has one. No torch here."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from samebit.trainer.config import OptimizerConfig, require


@dataclass(kw_only=True)
class CriticOptimizerConfig(OptimizerConfig):
    """The critic's own."""

    key: ClassVar[str] = "critic.optimizer"

    lr: float = 1e-5
    """Learning rate, after the warm-up."""


@dataclass(kw_only=True)
class CriticConfig:
    """The critic: a model that says what the rest of a sample is worth, at every token.

    It is spread over the processes as the policy is (trainer.parallel), and packed as it is.
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

    def __post_init__(self) -> None:
        require(self.model != "", "critic.model", self.model, "the path of a folder, or unset")
        require(self.warmup_steps >= 0, "critic.warmup_steps", self.warmup_steps, "at least 0")
        clip = self.cliprange_value
        require(0 <= clip < math.inf, "critic.cliprange_value", clip, "finite and at least 0")
        fits = 0 < self.vf_coef < math.inf
        require(fits, "critic.vf_coef", self.vf_coef, "positive and finite")
