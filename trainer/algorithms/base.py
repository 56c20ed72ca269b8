"""What an algorithm is to the trainer: a pure function from log-probs to a loss per token."""

from typing import Protocol

import torch

from samebit.trainer.types import MicroBatch


class Loss(Protocol):
    """Loss of every row of a micro-batch, before weighting and averaging."""

    def __call__(
        self,
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor | None,
        batch: MicroBatch,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """logprobs [R] (differentiable), ref_logprobs [R] -> (losses [R], metrics by name [R])."""
