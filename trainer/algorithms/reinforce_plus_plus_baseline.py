"""REINFORCE++-baseline: rewards against their prompt's mean, whitened over the training step.

A = R - mean over the prompt's samples, then (A - mean) / std over all tokens of the step; the loss
is REINFORCE++'s, with the KL, k2, in it. Source: Hu et al. 2025, arXiv 2501.03262.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from samebit.trainer.algorithms.base import Advantages
from samebit.trainer.algorithms.reinforce_plus_plus import (
    ReinforcePlusPlus,
    ReinforcePlusPlusConfig,
)
from samebit.trainer.algorithms.shaping import (
    Groups,
    all_equal,
    on_tokens,
    shaped_rewards,
    whitened,
)


@dataclass(kw_only=True)
class ReinforcePlusPlusBaselineConfig(ReinforcePlusPlusConfig):
    """The KL stands in the loss unless said otherwise; in a reward it is the sample's."""

    min_samples_per_prompt: ClassVar[int] = 2

    kl_estimator: str = "k2"
    kl_in: str = "loss"


class ReinforcePlusPlusBaseline(ReinforcePlusPlus):
    """See the module."""

    Config = ReinforcePlusPlusBaselineConfig

    def advantages(self, rewards: Tensor, groups: Groups) -> Advantages:
        """See Algorithm.advantages; they depend on all prompts of the step, and on no other."""
        rewards = shaped_rewards(rewards, groups, self.config)
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        centred = centred.masked_fill(all_equal(rewards), 0.0)
        found = [
            [np.full(s.num_trained, value) for s, value in zip(group, values, strict=True)]
            for group, values in zip(groups, centred.tolist(), strict=True)
        ]
        return on_tokens(groups, whitened(found, self.config.std_eps))
