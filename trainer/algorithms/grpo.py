"""GRPO: group-relative advantages and the clipped policy ratio.

Source: Shao et al. 2024, arXiv 2402.03300; separate clip bounds from DAPO, arXiv 2503.14476;
KL estimators from Schulman 2020, "Approximating KL divergence". Deviation from the paper: no
importance correction between rollout and trainer, because their log-probs are the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from samebit.trainer.algorithms.base import Advantages, Algorithm, LossInputs, LossOutputs
from samebit.trainer.config import GrpoConfig
from samebit.trainer.types import Sample


def group_advantages(rewards: Tensor, config: GrpoConfig) -> Tensor:
    """rewards [groups, n] -> advantages of the same shape, in fp64; give the rewards in fp64 too.

    A group whose rewards are all equal gets exact zeros. Raises ValueError for rewards so far
    apart that their deviation, or an advantage in fp32, is infinite.
    """
    rewards = rewards.double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    deviation = torch.ones_like(rewards[:, :1])
    if config.normalize_std and rewards.shape[1] > 1:
        deviation = rewards.std(dim=1, keepdim=True) + config.std_eps
        centred = centred / deviation
    advantages = centred.masked_fill(equal, 0.0)
    wrong = ~(torch.isfinite(advantages.float()) & (torch.isfinite(deviation) | equal))
    if wrong.any():
        group = rewards[int(wrong.any(dim=1).nonzero()[0])].tolist()
        raise ValueError(f"the rewards {group} of a prompt lie too far apart; scale them down")
    return advantages


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy; shapes [R]."""
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio


class Grpo(Algorithm[GrpoConfig]):
    """Dr. GRPO and the KL penalty are settings of it."""

    Config = GrpoConfig

    def __init__(self, config: GrpoConfig | None = None) -> None:
        super().__init__(config)
        self.needs_reference = self.config.kl_coef > 0

    def advantages(self, rewards: Tensor, groups: Sequence[Sequence[Sample]]) -> Advantages:
        """See Algorithm.advantages; those of a prompt depend on no other's rewards."""
        return group_advantages(rewards, self.config).tolist()

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Clipped surrogate per token, plus the KL penalty if it has a weight."""
        logprobs, batch = inputs.logprobs, inputs.batch
        assert batch.rollout_logprobs is not None
        ratio = torch.exp(logprobs - batch.rollout_logprobs)
        low, high = 1 - self.config.clip_ratio_low, 1 + self.config.clip_ratio_high
        plain = ratio * batch.advantages
        clipped = ratio.clamp(low, high) * batch.advantages
        losses = -torch.minimum(plain, clipped)
        metrics = {"train/ratio": ratio.detach(), "train/clip_fraction": (clipped < plain).float()}
        if self.config.kl_coef > 0:
            assert inputs.ref_logprobs is not None
            kl = kl_estimate(logprobs, inputs.ref_logprobs, self.config.kl_estimator)
            losses = losses + self.config.kl_coef * kl
            metrics["train/kl"] = kl.detach()
        return LossOutputs(losses, metrics)
