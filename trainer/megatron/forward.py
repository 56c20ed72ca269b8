"""Megatron's forward by itself: log-probs without gradients, optimizer or master weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import AttentionKind
from samebit.kernels.reduce import ALONE, RankGroup
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.config import ParallelConfig
from samebit.trainer.context import ContextShare, share_context
from samebit.trainer.megatron.cpu import no_cuda
from samebit.trainer.megatron.model import build_model, forward_logprobs
from samebit.trainer.megatron.parallel import gather_loss_rows
from samebit.trainer.megatron.setup import initialize
from samebit.trainer.megatron.stages import filled_up, from_last_stage, stage_of
from samebit.trainer.types import MicroBatch


def run_schedule(
    step: Callable[[Iterator[Any], Any], tuple[torch.Tensor, Any]],
    parts: Iterable[tuple[MicroBatch, Any]],
    chunks: Sequence[Any],
    **options: Any,
) -> Any:
    """Megatron's schedule for the present pipeline: step(iterator over parts, chunk) each time."""
    full = filled_up(parts)
    iterators = [iter(full) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(full),
        seq_length=max(batch.num_tokens for batch, _ in full),
        micro_batch_size=1,
        **options,
    )


def batch_logprobs(
    chunks: Sequence[Any],
    batches: Sequence[MicroBatch],
    model: ModelConfig,
    context: RankGroup = ALONE,
) -> list[torch.Tensor]:
    """Log-probs [R] of every micro-batch, without gradients, on every rank that shares the work.

    chunks: the GPTModels of this stage, or Megatron's DDPs around them.
    """
    shares: list[ContextShare | None] = [None] * len(batches)
    if context.size > 1:
        shares = [share_context(batch, context, chunks[0].config.attention) for batch in batches]
    parts = [
        (batch if share is None else share.batch, share)
        for batch, share in zip(batches, shares, strict=True)
    ]
    with torch.no_grad(), no_cuda():
        if chunks[0].config.pipeline_model_parallel_size > 1:
            own = _pipeline_logprobs(chunks, parts, model)
        else:
            own = [forward_logprobs(chunks[0], batch, model, share)[0] for batch, share in parts]
        return [
            found if share is None else gather_loss_rows(found, share, len(batch.rows))
            for found, share, batch in zip(own, shares, batches, strict=True)
        ]


def _pipeline_logprobs(
    chunks: Sequence[Any],
    parts: Sequence[tuple[MicroBatch, ContextShare | None]],
    model: ModelConfig,
) -> list[torch.Tensor]:
    """Through all stages, by Megatron's schedule."""

    def step(iterator: Any, gpt: Any) -> tuple[torch.Tensor, Any]:
        batch, share = next(iterator)
        return forward_logprobs(gpt, batch, model, share), lambda output, **_: output[0]

    found = run_schedule(step, parts, chunks, forward_only=True, collect_non_loss_data=True)
    device = parts[0][0].input_ids.device
    values = from_last_stage([x.cpu() for x in found])[: len(parts)]
    return [x.to(device) for x in values]


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
        tp_invariant: bool = False,
        longest: int | None = None,
        attention: type[AttentionKind] = CanonicalAttention,
    ) -> None:
        parallel = parallel or ParallelConfig()
        ranks, self._context = initialize(device, parallel, tp_invariant)
        kind = attention(model.attention_heads(ranks.size), device)
        model.selfcheck(kind, ranks)
        self.model = model
        with no_cuda():
            stage = stage_of(model)
            self._chunks = build_model(model, kind, parallel, stage, tp_invariant, longest)
        for chunk in self._chunks:
            chunk.requires_grad_(False)
        self.params = stage.named_params(self._chunks)
        if weights is not None:
            for name, param in self.params.items():
                param.data = weights[name]

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Log-probs [R] of every micro-batch."""
        return batch_logprobs(self._chunks, batches, self.model, self._context)
