"""What is made of rewards before and after an algorithm's baseline: penalties and whitening.

Pure functions in fp64 of a training step's rewards [prompts, samples] and samples.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from samebit.trainer.algorithms.policy_gradient import kl_estimate
from samebit.trainer.config import PolicyGradientConfig
from samebit.trainer.types import Sample

Groups = Sequence[Sequence[Sample]]


def shaped_rewards(rewards: Tensor, groups: Groups, config: PolicyGradientConfig) -> Tensor:
    """Rewards [prompts, samples] with the length's and, of whole samples, the KL's penalty."""
    rewards = rewards.double() - config.length_penalty_coef * length_penalties(
        rewards, groups, config
    )
    if config.kl_coef > 0 and config.kl_in == "reward":
        sums = [[token_penalties(sample, config).sum() for sample in group] for group in groups]
        rewards = rewards - torch.tensor(sums, dtype=torch.float64).view(rewards.shape)
    return rewards


def length_penalties(rewards: Tensor, groups: Groups, config: PolicyGradientConfig) -> Tensor:
    """[prompts, samples] fp64, before their weight; a length counts the tokens trained on.

    overlong: from 0 to 1 over the last overlong_buffer of max_response_len (Yu et al. 2025, DAPO,
    arXiv 2503.14476, equation 13). relative: (len - shortest) / (longest - shortest) - 1/2 within
    a prompt's samples, of which wrong ones, rewarded with at most 0, gain nothing; 0 where all are
    equally long (Kimi Team 2025, Kimi k1.5, arXiv 2501.12599, section 2.3.3).
    """
    if config.length_penalty == "none" or not rewards.numel():
        return torch.zeros_like(rewards, dtype=torch.float64)
    lens = torch.tensor([[s.num_trained for s in group] for group in groups], dtype=torch.float64)
    if config.length_penalty == "overlong":
        assert config.max_response_len is not None
        buffer = config.overlong_buffer * config.max_response_len
        return ((lens - (config.max_response_len - buffer)) / buffer).clamp(0, 1)
    shortest, longest = lens.amin(1, keepdim=True), lens.amax(1, keepdim=True)
    penalties = (lens - shortest) / (longest - shortest) - 0.5
    penalties = torch.where(rewards > 0, penalties, penalties.clamp(min=0))
    return penalties.masked_fill(shortest == longest, 0.0)


def token_penalties(sample: Sample, config: PolicyGradientConfig) -> np.ndarray:
    """[tokens trained on] fp64: kl_coef times each token's KL to the reference, for the reward.

    Source: Ziegler et al. 2019, arXiv 1909.08593.
    """
    assert sample.logprobs is not None
    assert sample.ref_logprobs is not None
    own, reference = (
        torch.from_numpy(x[sample.loss_mask].astype(np.float64))
        for x in (sample.logprobs, sample.ref_logprobs)
    )
    return config.kl_coef * kl_estimate(own, reference, config.kl_estimator).numpy()


def all_equal(rewards: Tensor) -> Tensor:
    """[prompts, 1] bool: whether all of a prompt's rewards [prompts, n] are the same."""
    return (rewards == rewards[:, :1]).all(dim=1, keepdim=True)


def require_groups(fits: Tensor, rewards: Tensor) -> None:
    """Raise ValueError that shows the first prompt's rewards [prompts, n] for which it is off."""
    if not fits.all():
        group = rewards[int((~fits).any(dim=1).nonzero()[0])].tolist()
        raise ValueError(f"the rewards {group} of a prompt lie too far apart; scale them down")


def whitened(advantages: Sequence[Sequence[np.ndarray]], eps: float) -> list[list[np.ndarray]]:
    """(A - mean) / (deviation + eps) over all tokens of the training step; zeros if all are equal.

    [prompts][samples], each [tokens trained on] fp64. The deviation divides by their number. An
    advantage depends so on the other prompts of its step, and on nothing beyond. Raises ValueError
    where the deviation, or an advantage in fp32, is infinite.
    """
    if not (parts := list(chain(*advantages))):
        return [[] for _ in advantages]
    flat = np.concatenate(parts)
    if (flat == flat[0]).all():
        return [[np.zeros_like(x) for x in group] for group in advantages]
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = flat.mean(), flat.std()
        found = [[(x - mean) / (deviation + eps) for x in group] for group in advantages]
        finite = all(np.isfinite(x.astype(np.float32)).all() for x in chain(*found))
    if not (finite and np.isfinite(deviation)):
        raise ValueError(
            f"the rewards of a training step, from {flat.min()} to {flat.max()}, lie too far "
            "apart; scale them down"
        )
    return found


def on_tokens(groups: Groups, advantages: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """Advantages [prompts][samples] of the tokens trained on, as the samples take them: [L]."""
    return [
        [sample.in_place(values, "advantages") for sample, values in zip(group, found, strict=True)]
        for group, found in zip(groups, advantages, strict=True)
    ]
