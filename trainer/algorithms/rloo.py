"""RLOO: REINFORCE, each sample against the mean of its prompt's others.

A_i = R_i - mean of R_j, j != i; loss = -A log policy. Rewards are lowered by the KL, if it has a
weight. Sources: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et
al. 2024, arXiv 2402.14740. A rollout's later optimizer steps are off-policy, which the paper does
not have: with tis_clip they are weighted by min(ratio, tis_clip).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from samebit.trainer.algorithms.base import Advantages, LossInputs, LossOutputs
from samebit.trainer.algorithms.policy_gradient import (
    PolicyGradient,
    penalized,
    truncated,
    truncation_metrics,
)
from samebit.trainer.algorithms.shaping import Groups, all_equal, require_groups, shaped_rewards
from samebit.trainer.config import PolicyGradientConfig


@dataclass(kw_only=True)
class RlooConfig(PolicyGradientConfig):
    """What all have; the KL stands in the reward unless said otherwise."""

    min_samples_per_prompt: ClassVar[int] = 2

    kl_estimator: str = "k1"
    kl_in: str = "reward"


def leave_one_out(rewards: Tensor) -> Tensor:
    """rewards [prompts, n], n >= 2 -> each minus the mean of its prompt's others, in fp64.

    A group whose rewards are all equal gets exact zeros. Raises ValueError for rewards so far apart
    that an advantage in fp32 is infinite.
    """
    rewards, n = rewards.double(), rewards.shape[1]
    if n == 1:
        raise ValueError("a prompt has 1 sample; leave-one-out needs at least 2")
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (n - 1)
    advantages = (rewards - others).masked_fill(all_equal(rewards), 0.0)
    require_groups(torch.isfinite(advantages.float()), rewards)
    return advantages


class Rloo(PolicyGradient[RlooConfig]):
    """See the module."""

    Config = RlooConfig

    def advantages(self, rewards: Tensor, groups: Groups) -> Advantages:
        """See Algorithm.advantages; those of a prompt depend on no other's rewards."""
        return leave_one_out(shaped_rewards(rewards, groups, self.config)).tolist()

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The log-likelihood of each token, by its sample's advantage."""
        log_ratio, bound = inputs.log_ratio.detach(), self.config.tis_clip
        weight = torch.exp(truncated(log_ratio, bound)) if bound > 0 else 1.0
        losses = -(weight * inputs.batch.advantages * inputs.logprobs)
        ratio = torch.exp(log_ratio)
        metrics = {"train/ratio": ratio} | truncation_metrics(ratio, bound)
        return penalized(inputs, losses, metrics, self.config)
