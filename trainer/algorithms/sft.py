"""Supervised fine-tuning: the negative log-likelihood of the response tokens."""

import torch

from samebit.trainer.types import MicroBatch


def sft_loss(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor | None, batch: MicroBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """See trainer.algorithms.base.Loss."""
    return -logprobs, {}
