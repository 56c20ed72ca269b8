"""Rewards on the scale of all that a run has been trained on so far: reward.normalize, reward.clip.

A reward less their mean, over their deviation, and no further from 0 than clip. Source: Zheng et
al. 2023, "Secrets of RLHF in large language models part I: PPO", arXiv 2307.04964, section 5.3.1.
"""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from samebit.recipes.data.reward_config import RewardConfig

Moments = Sequence[float]
"""Of some rewards: how many, their mean, and the sum of their squared distances from it."""
NO_REWARDS: Moments = (0, 0.0, 0.0)


def moments_with(seen: Moments, rewards: Sequence[float]) -> Moments:
    """Return those of the rewards seen and these together (Chan, Golub and LeVeque 1979).

    Sums are rounded once, so that they do not depend on how they are added up. Raises ValueError
    for rewards so far apart that one is infinite.
    """
    (n, mean, squares), m = seen, len(rewards)
    try:
        # The mean of equal ones is theirs, to the bit: a rounded one would be some distance away.
        own = math.fsum(rewards) / m if min(rewards) < max(rewards) else rewards[0]
        distance = own - mean
        mean = own if n == 0 else mean + distance * (m / (n + m))
        squares += math.fsum([(x - own) ** 2 for x in rewards] + [distance**2 * (n * m / (n + m))])
    except OverflowError:
        squares = math.inf
    if not (math.isfinite(mean) and math.isfinite(squares)):
        raise ValueError(
            f"the rewards of a training step, from {min(rewards)} to {max(rewards)}, and those "
            "before lie too far apart to be normalized; scale them down"
        )
    return n + m, mean, squares


class RewardScale:
    """Scales the rewards of one training step after another."""

    def __init__(self, config: RewardConfig, seen: Moments) -> None:
        self._config = config
        self.seen = seen
        """What earlier steps have had, and the latest; a run goes on from it."""

    def scaled(self, rewards: Tensor) -> Tensor:
        """Return the next training step's rewards [prompts, samples] fp64 as they count.

        Zeros where all so far are equal. Raises ValueError as moments_with does.
        """
        if self._config.normalize == "running":
            self.seen = moments_with(self.seen, list(chain(*rewards.tolist())))
            deviation = self._deviation
            centred = rewards - self.seen[1]
            rewards = centred / deviation if deviation > 0 else torch.zeros_like(rewards)
        bound = self._config.clip
        return rewards.clamp(-bound, bound) if bound > 0 else rewards

    @property
    def metrics(self) -> dict[str, float]:
        """Return what rewards are normalized by; nothing where they are not."""
        if self._config.normalize == "none":
            return {}
        figures = {"mean": self.seen[1], "std": self._deviation}
        return {f"rollout/reward_running_{name}": value for name, value in figures.items()}

    @property
    def _deviation(self) -> float:
        """It divides by the number of rewards."""
        return math.sqrt(self.seen[2] / self.seen[0])
