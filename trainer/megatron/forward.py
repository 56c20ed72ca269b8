"""Megatron's forward by itself: log-probs without gradients, optimizer or master weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from samebit.kernels.reduce import ALONE, TensorRanks
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import selfcheck_model
from samebit.trainer.config import ParallelConfig
from samebit.trainer.context import share_context
from samebit.trainer.megatron.cpu import no_cuda
from samebit.trainer.megatron.model import build_model, forward_logprobs
from samebit.trainer.megatron.parallel import gather_loss_rows
from samebit.trainer.megatron.setup import initialize
from samebit.trainer.megatron.stages import from_last_stage, stage_of
from samebit.trainer.types import MicroBatch


def batch_logprobs(
    gpt: Any, batches: Sequence[MicroBatch], model: ModelConfig, context: TensorRanks = ALONE
) -> list[torch.Tensor]:
    """Log-probs [R] of every micro-batch, without gradients, on every rank that shares the work."""

    def one(batch: MicroBatch) -> torch.Tensor:
        if context.size == 1:
            return forward_logprobs(gpt, batch, model)[0]
        share = share_context(batch, context, model.heads_per_kv)
        own = forward_logprobs(gpt, share.batch, model, share)[0]
        return gather_loss_rows(own, share, len(batch.rows))

    with torch.no_grad(), no_cuda():
        if gpt.config.pipeline_model_parallel_size > 1:
            return _pipeline_logprobs(gpt, batches, model)
        return [one(batch) for batch in batches]


def _pipeline_logprobs(
    gpt: Any, batches: Sequence[MicroBatch], model: ModelConfig
) -> list[torch.Tensor]:
    """Through all stages, by Megatron's schedule."""

    def forward_step(iterator: Any, gpt: Any) -> tuple[torch.Tensor, Any]:
        return forward_logprobs(gpt, next(iterator), model), lambda output, **_: output[0]

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[gpt],
        num_microbatches=len(batches),
        seq_length=max(b.num_tokens for b in batches),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return from_last_stage(found)


class ForwardModel:
    """A policy that is only read: the KL reference, or an engine's weights seen by Megatron.

    `weights`, by Megatron's names, are used in place and may be rewritten by their owner. Without
    them `params` are uninitialised memory of the model's own.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        weights: Mapping[str, torch.Tensor] | None = None,
        parallel: ParallelConfig | None = None,
    ) -> None:
        parallel = parallel or ParallelConfig()
        ranks, self._context = initialize(device, parallel)
        selfcheck_model(model, device, ranks)
        self.model = model
        with no_cuda():
            stage = stage_of(model)
            self._gpt = build_model(model, device, parallel, stage).requires_grad_(False)
        self.params = stage.named_params(self._gpt)
        if weights is not None:
            for name, param in self.params.items():
                param.data = weights[name]

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Log-probs [R] of every micro-batch."""
        return batch_logprobs(self._gpt, batches, self.model, self._context)
