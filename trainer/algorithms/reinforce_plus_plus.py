"""REINFORCE++: PPO's loss without a critic, advantages whitened over the training step.

A_t = R - kl_coef * sum over i >= t of KL_i, then (A - mean) / std over all tokens of the step; loss
= -min(r A, clip(r, 1 - low, 1 + high) A). A prompt needs no second sample. Source: Hu et al. 2025,
arXiv 2501.03262; that whitening counts tokens is its authors' code (OpenRLHF).
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from samebit.trainer.algorithms.base import Advantages, LossInputs, LossOutputs
from samebit.trainer.algorithms.policy_gradient import PolicyGradient, clipped_surrogate, penalized
from samebit.trainer.algorithms.shaping import (
    Groups,
    length_penalties,
    on_tokens,
    token_penalties,
    whitened,
)
from samebit.trainer.config import ClippedConfig, require


@dataclass(kw_only=True)
class ReinforcePlusPlusConfig(ClippedConfig):
    """The KL stands in the reward of each token unless said otherwise."""

    kl_estimator: str = "k1"
    kl_in: str = "reward"
    std_eps: float = 1e-6
    """Added to the deviation by which advantages are divided."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.std_eps >= 0, "algorithm.std_eps", self.std_eps, "at least 0")


class ReinforcePlusPlus(PolicyGradient[ReinforcePlusPlusConfig]):
    """See the module."""

    Config = ReinforcePlusPlusConfig

    def advantages(self, rewards: Tensor, groups: Groups) -> Advantages:
        """See Algorithm.advantages; they depend on all prompts of the step, and on no other."""
        config = self.config
        penalties = config.length_penalty_coef * length_penalties(rewards, groups, config)
        returns = (rewards.double() - penalties).tolist()
        found = []
        for group, values in zip(groups, returns, strict=True):
            tokens = [np.full(s.num_trained, value) for s, value in zip(group, values, strict=True)]
            if self.rewards_need_reference:
                costs = [token_penalties(sample, config) for sample in group]
                to_go = [np.cumsum(x[::-1])[::-1] for x in costs]
                tokens = [x - cost for x, cost in zip(tokens, to_go, strict=True)]
            found.append(tokens)
        return on_tokens(groups, whitened(found, config.std_eps))

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The clipped surrogate per token."""
        found = clipped_surrogate(inputs.log_ratio, inputs.batch.advantages, self.config)
        return penalized(inputs, *found, self.config)
