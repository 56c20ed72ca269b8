"""What a critic learns by: the squared distance of its values from the returns, clipped.

loss = vf_coef * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), R = GAE + V_old. Source: the
code of Schulman et al. 2017, arXiv 1707.06347 (OpenAI baselines), as RL frameworks have it.
"""

import torch
from torch import Tensor

from samebit.trainer.algorithms.base import LossOutputs
from samebit.trainer.critic.config import CriticConfig


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, config: CriticConfig
) -> LossOutputs:
    """All [R] fp32: the present values, which are differentiated, those of the rollout, returns."""
    errors = (values - returns).square()
    metrics = {"critic/vpred_mean": values.detach()}
    if config.cliprange_value > 0:
        moved = (values - old_values).clamp(-config.cliprange_value, config.cliprange_value)
        clipped = (old_values + moved - returns).square()
        counts = clipped > errors
        errors = torch.where(counts, clipped, errors)
        metrics["critic/vf_clipfrac"] = counts.float()
    return LossOutputs(config.vf_coef * errors, metrics)
