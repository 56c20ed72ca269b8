"""On-policy distillation: the policy learns from what a teacher says of the policy's own samples.

A_t = log teacher - log policy of the drawn token, under the weights that drew: with a minus, what
one sample estimates the reverse KL of its position by, KL(policy || teacher). loss = -min(r A,
clip(r, 1 - low, 1 + high) A), whose gradient on the first optimizer step is, in the mean, that of
the positions' reverse KLs, each given the tokens before it. With loss_top_k the loss is that KL
itself, over the teacher's k likeliest tokens and all others as one (kernels/top_tokens.py).
Sources: Agarwal et al. 2024 (GKD), arXiv 2306.13649, with lambda = 1 and the reverse KL; of k
tokens and the rest, "Tail-Aware Top-k On-Policy Distillation", arXiv 2608.14728. Deviation from
GKD: never the teacher's whole distribution. Rewards are not read.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from samebit.trainer.algorithms.base import Advantages, LossInputs, LossOutputs
from samebit.trainer.algorithms.policy_gradient import PolicyGradient, clipped_surrogate, penalized
from samebit.trainer.algorithms.shaping import Groups
from samebit.trainer.config import ClippedConfig, require, require_default
from samebit.trainer.types import Sample


@dataclass(kw_only=True)
class DistillationConfig(ClippedConfig):
    """What the teacher is asked for; where the policy ratio counts, entropy, and a KL to the run's
    start in the loss."""

    loss_top_k: int = 0
    """The loss is the reverse KL over so many of the teacher's likeliest tokens and the rest; 0:
    what the drawn token estimates it by."""

    sections: ClassVar[tuple[str, ...]] = ("distillation",)
    reads_rewards: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "advantages are the teacher's: no reward is read"
        require_default(self, "algorithm", ("length_penalty",), where)
        require(self.kl_in == "loss", "algorithm.kl_in", self.kl_in, f"loss: {where}")
        require(self.loss_top_k >= 0, "algorithm.loss_top_k", self.loss_top_k, "at least 0")
        if self.loss_top_k:
            clips = ("clip_ratio_low", "clip_ratio_high", "dual_clip", "tis_clip")
            idle = (*clips, "off_policy_mask_threshold")
            where = "algorithm.loss_top_k is set: the loss has no policy ratio"
            require_default(self, "algorithm", idle, where)


class Distillation(PolicyGradient[DistillationConfig]):
    """See the module."""

    Config = DistillationConfig
    needs_teacher = True

    def __init__(self, config: DistillationConfig | None = None) -> None:
        super().__init__(config)
        self.teacher_top_k = self.config.loss_top_k

    def advantages(self, rewards: Tensor, groups: Groups) -> Advantages:
        """See Algorithm.advantages; those of a sample depend on no other."""
        return [[_log_ratio(sample) for sample in group] for group in groups]

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The clipped surrogate per token, or the KL of its place."""
        if self.config.loss_top_k:
            assert inputs.teacher_kl is not None
            ratio, kl = torch.exp(inputs.log_ratio.detach()), inputs.teacher_kl.detach()
            metrics = {"train/ratio": ratio, "train/reverse_kl": kl}
            return penalized(inputs, inputs.teacher_kl, metrics, self.config)
        found = clipped_surrogate(inputs.log_ratio, inputs.batch.advantages, self.config)
        return penalized(inputs, *found, self.config)


def _log_ratio(sample: Sample) -> np.ndarray:
    """[L] fp32: log(teacher / policy), which says something where the mask is set."""
    assert sample.logprobs is not None
    assert sample.teacher_logprobs is not None
    return sample.teacher_logprobs - sample.logprobs
