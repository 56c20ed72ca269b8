"""CISPO: REINFORCE with a clipped, detached importance weight; no token loses its gradient.

loss = -sg[clip(r, 1 - low, 1 + high)] A log policy, with GRPO's advantages. Source: MiniMax 2025
(MiniMax-M1), arXiv 2506.13585, equations 4 and 5. It has no lower bound either, unless one is set.
"""

from dataclasses import dataclass

import torch

from samebit.trainer.algorithms.base import LossInputs, LossOutputs
from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.algorithms.policy_gradient import penalized
from samebit.trainer.config import GrpoConfig, require_default


@dataclass(kw_only=True)
class CispoConfig(GrpoConfig):
    """GRPO's, with bounds of the weight."""

    clip_ratio_low: float = 1.0
    """The weight is at least 1 minus this; 1: without a bound."""
    clip_ratio_high: float = 4.0
    """The weight is at most 1 plus this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "the loss is CISPO's: algorithm.clip_ratio_high bounds the weight"
        require_default(self, "algorithm", ("dual_clip", "tis_clip"), where)


class Cispo(Grpo):
    """See the module."""

    Config = CispoConfig

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The weighted log-likelihood of each token."""
        ratio = torch.exp(inputs.log_ratio.detach())
        weight = ratio.clamp(1 - self.config.clip_ratio_low, 1 + self.config.clip_ratio_high)
        losses = -(weight * inputs.batch.advantages * inputs.logprobs)
        metrics = {"train/ratio": ratio, "train/clip_fraction": (weight != ratio).float()}
        return penalized(inputs, losses, metrics, self.config)
