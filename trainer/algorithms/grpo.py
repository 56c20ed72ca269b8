"""GRPO: group-relative advantages and the clipped policy ratio.

Source: Shao et al. 2024, arXiv 2402.03300; separate clip bounds from DAPO, arXiv 2503.14476;
KL estimators from Schulman 2020, "Approximating KL divergence". Deviation from the paper: no
importance correction between rollout and trainer, because their log-probs are the same bits.
"""

from dataclasses import dataclass

import torch

from samebit.trainer.config import GrpoConfig
from samebit.trainer.types import MicroBatch


def group_advantages(rewards: torch.Tensor, config: GrpoConfig) -> torch.Tensor:
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


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy; shapes [R]."""
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio


@dataclass(frozen=True)
class GrpoLoss:
    """See trainer.algorithms.base.Loss."""

    config: GrpoConfig

    def __call__(
        self,
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor | None,
        batch: MicroBatch,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Clipped surrogate per token, plus the KL penalty if it has a weight."""
        assert batch.rollout_logprobs is not None
        ratio = torch.exp(logprobs - batch.rollout_logprobs)
        low, high = 1 - self.config.clip_ratio_low, 1 + self.config.clip_ratio_high
        plain = ratio * batch.advantages
        clipped = ratio.clamp(low, high) * batch.advantages
        losses = -torch.minimum(plain, clipped)
        metrics = {
            "train/ratio": ratio.detach(),
            "train/clip_fraction": (clipped < plain).float(),
        }
        if self.config.kl_coef > 0:
            assert ref_logprobs is not None
            kl = kl_estimate(logprobs, ref_logprobs, self.config.kl_estimator)
            losses = losses + self.config.kl_coef * kl
            metrics["train/kl"] = kl.detach()
        return losses, metrics
