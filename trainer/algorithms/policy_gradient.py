"""What the losses of policy-gradient algorithms share: bounded ratios, KL, entropy.

Each is a pure function of rows [R] in fp32. Off-policy is what a rollout's later optimizer steps
train on; on the first one every ratio is exactly 1, and no bound is reached.
"""

import math

import torch
from torch import Tensor

from samebit.trainer.algorithms.base import Algorithm, LossInputs, LossOutputs
from samebit.trainer.config import ClippedConfig, PolicyGradientConfig


class PolicyGradient[C: PolicyGradientConfig](Algorithm[C]):
    """An algorithm whose settings say whether it needs a reference, and the entropy's gradient."""

    def __init__(self, config: C | None = None) -> None:
        super().__init__(config)
        penalizes, place = self.config.kl_coef > 0, self.config.kl_in
        # A subclass may need them for more.
        self.needs_reference |= penalizes and place == "loss"
        self.rewards_need_reference |= penalizes and place == "reward"
        self.refresh_reference_every = self.config.kl_refresh_every
        self.needs_entropy_grad |= self.config.entropy_coef > 0


def truncated(log_ratio: Tensor, bound: float) -> Tensor:
    """Log ratios whose values end at log(bound), and whose gradients do not; bound 0: as they are.

    Of a loss -exp(truncated) * advantage, the gradient is min(ratio, bound) times the score
    function's. Truncated importance sampling: Ionides 2008; of rollouts, Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training".
    """
    if bound == 0:
        return log_ratio
    value, limit = log_ratio.detach(), math.log(bound)
    return torch.where(value > limit, limit + (log_ratio - value), log_ratio)


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, config: ClippedConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's losses -min(r A, clip(r, 1 - low, 1 + high) A), and metrics.

    Said by sign: where A >= 0 the ratio counts up to 1 + high, where A < 0 from 1 - low, and up to
    dual_clip if that is set. A clipped row has no gradient, even where its ratio is infinite.
    Sources: Schulman et al. 2017, arXiv 1707.06347; two bounds: Yu et al. 2025 (DAPO), arXiv
    2503.14476; dual clip: Ye et al. 2019, arXiv 1912.09729.
    """
    ratio, is_good = torch.exp(log_ratio.detach()), advantages >= 0
    most = config.dual_clip or math.inf
    lower = torch.where(is_good, 0.0, 1 - config.clip_ratio_low)
    upper = torch.where(is_good, 1 + config.clip_ratio_high, most)
    counts = (lower <= ratio) & (ratio <= upper)
    weighted = torch.exp(truncated(log_ratio, config.tis_clip).masked_fill(~counts, 0.0))
    losses = -(torch.where(counts, weighted, ratio.clamp(lower, upper)) * advantages)
    metrics = {
        "train/ratio": ratio,
        "train/clip_fraction": (~counts & (advantages != 0)).float(),
    }
    return losses, metrics | truncation_metrics(ratio, config.tis_clip)


def truncation_metrics(ratio: Tensor, bound: float) -> dict[str, Tensor]:
    """Which ratios truncated importance sampling cuts; nothing where it is off."""
    return {"train/tis_fraction": (ratio > bound).float()} if bound > 0 else {}


def off_policy_mask(inputs: LossInputs, threshold: float) -> Tensor:
    """[R] bool: tokens of negative advantage in samples of which the mean over their tokens of
    log(rollout / policy) is above the threshold.

    To push down what the policy hardly draws any more teaches little and moves much: off-policy
    sequence masking, DeepSeek-AI 2025 (DeepSeek-V3.2), arXiv 2512.02556.
    """
    moved = inputs.in_rows(inputs.sample_means(-inputs.log_ratio.detach()))
    return (inputs.batch.advantages < 0) & (moved > threshold)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate k1, k2 or k3 of KL(policy || reference) from the policy's samples.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio


def penalized(
    inputs: LossInputs, losses: Tensor, metrics: dict[str, Tensor], config: PolicyGradientConfig
) -> LossOutputs:
    """Losses [R] without those of masked tokens, and with the KL to the reference and the entropy,
    by the weights that they have; of a masked token these are left.

    k3_unbiased is the policy ratio times k3: its gradient is the ratio times log(policy /
    reference) times the score, in the mean the KL's own (DeepSeek-AI 2025, DeepSeek-V3.2).
    """
    if config.off_policy_mask_threshold > 0:
        masked = off_policy_mask(inputs, config.off_policy_mask_threshold)
        losses = losses.masked_fill(masked, 0.0)
        metrics = metrics | {"train/off_policy_mask_fraction": masked.float()}
    if config.kl_coef > 0 and config.kl_in == "loss":
        assert inputs.ref_logprobs is not None
        kl = kl_estimate(inputs.logprobs, inputs.ref_logprobs, config.kl_estimator)
        if config.kl_estimator == "k3_unbiased":
            kl = torch.exp(inputs.log_ratio) * kl
        losses = losses + config.kl_coef * kl
        metrics = metrics | {"train/kl": kl.detach()}
    if config.entropy_coef > 0:
        losses = losses - config.entropy_coef * inputs.entropies
    return LossOutputs(losses, metrics)
