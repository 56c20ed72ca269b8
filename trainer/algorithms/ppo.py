"""PPO: the clipped policy ratio, with advantages from a critic.

A = GAE(gamma, lam) of a reward that stands at a sample's last token, less the KL of each token
where that is in the reward; then (A - mean) / std over all tokens of the training step; loss =
-min(r A, clip(r, 1 - low, 1 + high) A). The critic learns A + V, before whitening
(critic/value_loss.py).
Sources: Schulman et al. 2017, arXiv 1707.06347; 2016, arXiv 1506.02438 (GAE). Deviation from the
first: policy and critic are two models, each with an optimizer, as RL frameworks have them.
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
    length_penalties,
    on_tokens,
    token_penalties,
    whitened,
)
from samebit.trainer.config import require
from samebit.trainer.critic.gae import advantage_estimates
from samebit.trainer.types import Sample


@dataclass(kw_only=True)
class PpoConfig(ReinforcePlusPlusConfig):
    """The KL stands in the reward of each token unless said otherwise."""

    sections: ClassVar[tuple[str, ...]] = ("critic",)

    gamma: float = 1.0
    """What a reward counts one token earlier."""
    lam: float = 0.95
    """GAE's lambda: 1 trusts rewards alone, 0 the critic's next value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"algorithm.{name}", value, "in [0, 1]")


class Ppo(ReinforcePlusPlus):
    """See the module."""

    Config = PpoConfig
    config: PpoConfig
    needs_values = True

    def advantages(self, rewards: Tensor, groups: Groups) -> Advantages:
        """See Algorithm.advantages; they depend on all prompts of the step, and on no other."""
        return on_tokens(groups, whitened(self._estimates(rewards, groups), self.config.std_eps))

    def returns(self, rewards: Tensor, groups: Groups) -> Advantages:
        """See Algorithm.returns; those of a sample depend on no other."""
        found = self._estimates(rewards, groups)
        return on_tokens(
            groups,
            [
                [x + values_of(sample) for sample, x in zip(group, values, strict=True)]
                for group, values in zip(groups, found, strict=True)
            ],
        )

    def _estimates(self, rewards: Tensor, groups: Groups) -> list[list[np.ndarray]]:
        """GAE of every sample, [prompts][samples], each [tokens trained on] fp64."""
        config = self.config
        penalties = config.length_penalty_coef * length_penalties(rewards, groups, config)
        totals = (rewards.double() - penalties).tolist()
        return [
            [self._of_sample(sample, score) for sample, score in zip(group, scores, strict=True)]
            for group, scores in zip(groups, totals, strict=True)
        ]

    def _of_sample(self, sample: Sample, score: float) -> np.ndarray:
        rewards = np.zeros(sample.num_trained)
        if self.rewards_need_reference:
            rewards -= token_penalties(sample, self.config)
        rewards[-1] += score
        values = values_of(sample)
        return advantage_estimates(rewards, values, self.config.gamma, self.config.lam)


def values_of(sample: Sample) -> np.ndarray:
    """[tokens trained on] fp64: the critic's."""
    assert sample.values is not None
    return sample.values[sample.loss_mask].astype(np.float64)
