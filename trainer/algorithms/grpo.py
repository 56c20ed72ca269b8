"""GRPO: group-relative advantages and the clipped policy ratio.

A = (r - mean) / (std + eps) within a prompt's samples; loss = -min(r A, clip(r, 1 - low, 1 + high)
A). Source: Shao et al. 2024, arXiv 2402.03300. Settings of it are Dr. GRPO (no std, loss mean by a
constant; Liu et al. 2025, arXiv 2503.20783), DAPO's loss (Yu et al. 2025, arXiv 2503.14476) and the
deviation of the whole batch (Liu et al. 2025, arXiv 2508.08221): see configs/algorithm. Deviation
from the paper: no importance correction between rollout and trainer, because their log-probs are
the same bits; and the loss is a mean over a batch's tokens, where the paper's is one over each
sample's and then over samples (trainer.loss_mean=sequence).
"""

import torch
from torch import Tensor

from samebit.trainer.algorithms.base import Advantages, LossInputs, LossOutputs
from samebit.trainer.algorithms.policy_gradient import PolicyGradient, clipped_surrogate, penalized
from samebit.trainer.algorithms.shaping import Groups, all_equal, require_groups, shaped_rewards
from samebit.trainer.config import GrpoConfig


def group_advantages(rewards: Tensor, config: GrpoConfig) -> Tensor:
    """rewards [groups, n] -> advantages of the same shape, in fp64; give the rewards in fp64 too.

    A group whose rewards are all equal gets exact zeros. Raises ValueError for rewards so far
    apart that their deviation, or an advantage in fp32, is infinite.
    """
    rewards = rewards.double()
    if not rewards.numel():
        return rewards
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = all_equal(rewards)
    deviation = torch.ones_like(rewards[:, :1])
    if config.normalize_std and config.std_over == "batch" and rewards.numel() > 1:
        deviation = deviation * (rewards.std() + config.std_eps)
    elif config.normalize_std and config.std_over == "group" and rewards.shape[1] > 1:
        deviation = rewards.std(dim=1, keepdim=True) + config.std_eps
    advantages = (centred / deviation).masked_fill(equal, 0.0)
    finite = torch.isfinite(advantages.float()) & (torch.isfinite(deviation) | equal)
    require_groups(finite, rewards)
    return advantages


class Grpo(PolicyGradient[GrpoConfig]):
    """See the module."""

    Config = GrpoConfig

    def advantages(self, rewards: Tensor, groups: Groups) -> Advantages:
        """See Algorithm.advantages; with std_over=group, of a prompt they depend on no other's."""
        return group_advantages(shaped_rewards(rewards, groups, self.config), self.config).tolist()

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The clipped surrogate per token."""
        found = clipped_surrogate(inputs.log_ratio, inputs.batch.advantages, self.config)
        return penalized(inputs, *found, self.config)
