"""GSPO: GRPO with one ratio for a whole sample.

s = exp(mean over the sample's tokens of log(policy / rollout)); loss = -min(s A, clip(s, 1 - low,
1 + high) A), which trainer.loss_mean=sequence counts once a sample. GSPO-token gives each token the
value of s and its own gradient, s_t = sg[s] * policy_t / sg[policy_t], so that tokens may have
advantages of their own; with one for all it is the same gradient. Source: Zheng et al. 2025, arXiv
2507.18071, equations 5, 7 and 13; clip bounds of its section 5.1.
"""

from dataclasses import dataclass

from samebit.trainer.algorithms.base import LossInputs, LossOutputs
from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.algorithms.policy_gradient import clipped_surrogate, penalized
from samebit.trainer.config import GrpoConfig


@dataclass(kw_only=True)
class GspoConfig(GrpoConfig):
    """GRPO's, with clip bounds for ratios of whole samples."""

    clip_ratio_low: float = 3e-4
    clip_ratio_high: float = 4e-4
    token_level: bool = False
    """GSPO-token: a token's gradient is by its own advantage."""


class Gspo(Grpo):
    """See the module."""

    Config = GspoConfig
    config: GspoConfig

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The clipped surrogate of the sample's ratio, in each of its rows."""
        log_ratio = inputs.in_rows(inputs.sample_means(inputs.log_ratio))
        if self.config.token_level:
            log_ratio = log_ratio.detach() + (inputs.logprobs - inputs.logprobs.detach())
        found = clipped_surrogate(log_ratio, inputs.batch.advantages, self.config)
        return penalized(inputs, *found, self.config)
