"""On-policy distillation: the policy learns from what a teacher says of the policy's own samples.

A_t = log teacher - log policy of the drawn token, under the weights that drew: with a minus, what
one sample estimates the reverse KL of its position by, KL(policy || teacher). loss = -min(r A,
clip(r, 1 - low, 1 + high) A), whose gradient on the first optimizer step is, in the mean, that of
the positions' reverse KLs, each given the tokens before it. Source: Agarwal et al. 2024 (GKD),
arXiv 2306.13649, with lambda = 1 and the reverse KL. Deviation from it: the score function of the
drawn token instead of the teacher's whole distribution, which an engine does not give. Rewards are
not read.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from samebit.trainer.algorithms.base import Advantages, LossInputs, LossOutputs
from samebit.trainer.algorithms.policy_gradient import PolicyGradient, clipped_surrogate, penalized
from samebit.trainer.algorithms.shaping import Groups
from samebit.trainer.config import ClippedConfig, require, require_default
from samebit.trainer.types import Sample


@dataclass(kw_only=True)
class DistillationConfig(ClippedConfig):
    """Where the policy ratio counts, entropy, and a KL to the run's start in the loss."""

    sections: ClassVar[tuple[str, ...]] = ("distillation",)

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "advantages are the teacher's: no reward is read"
        require_default(self, "algorithm", ("length_penalty",), where)
        require(self.kl_in == "loss", "algorithm.kl_in", self.kl_in, f"loss: {where}")


class Distillation(PolicyGradient[DistillationConfig]):
    """See the module."""

    Config = DistillationConfig
    needs_teacher = True

    def advantages(self, rewards: Tensor, groups: Groups) -> Advantages:
        """See Algorithm.advantages; those of a sample depend on no other."""
        return [[_log_ratio(sample) for sample in group] for group in groups]

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The clipped surrogate per token."""
        found = clipped_surrogate(inputs.log_ratio, inputs.batch.advantages, self.config)
        return penalized(inputs, *found, self.config)


def _log_ratio(sample: Sample) -> np.ndarray:
    """[L] fp32: log(teacher / policy), which says something where the mask is set."""
    assert sample.logprobs is not None
    assert sample.teacher_logprobs is not None
    return sample.teacher_logprobs - sample.logprobs
