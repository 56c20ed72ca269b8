"""Megatron's forward by itself: log-probs without optimizer or master weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import AttentionKind
from samebit.kernels.truncation import KeptSets, Thresholds
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.config import ParallelConfig
from samebit.trainer.context import ContextShare, share_context
from samebit.trainer.megatron.cpu import no_cuda
from samebit.trainer.megatron.model import build_model, forward_logprobs
from samebit.trainer.megatron.parallel import gather_loss_rows, ranks_of
from samebit.trainer.megatron.setup import process_groups
from samebit.trainer.megatron.stages import filled_up, from_last_stage, stage_of
from samebit.trainer.types import MicroBatch


class ForwardModel:
    """This process's part of a policy, and its forward: log-probs without gradients.

    `params` are the live parameters by their names in the whole model. Given `weights`, by the same
    names, those are used in place, never differentiated, and may be rewritten by their owner; else
    the memory is the model's own and uninitialised.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        weights: Mapping[str, Tensor] | None = None,
        parallel: ParallelConfig | None = None,
        tp_invariant: bool = False,
        longest: int | None = None,
        attention: type[AttentionKind] = CanonicalAttention,
    ) -> None:
        """longest: tokens of the longest sample that may come; None: what the context holds."""
        self.model, self.device, self.longest = model, device, longest
        self.parallel = parallel or ParallelConfig()
        self.groups = process_groups(device, self.parallel)
        self.ranks, self.context = ranks_of(self.groups.tp, tp_invariant), ranks_of(self.groups.cp)
        self.attention = attention(model.attention_heads(self.ranks.size), device)
        model.selfcheck(self.attention, self.ranks)
        self.stage = stage_of(model, self.groups.pp, self.parallel)
        with no_cuda():
            chunks = build_model(
                model,
                self.attention,
                self.parallel,
                self.groups,
                self.stage,
                tp_invariant,
                longest,
            )
        self._chunks: Sequence[Any] = chunks  # GPTModels, or Megatron's DDPs around them
        self.params: Mapping[str, Tensor] = self.stage.named_params(chunks)
        if weights is not None:
            for name, param in self.params.items():
                param.requires_grad_(False)
                param.data = weights[name]

    def like(self, kind: "type[ForwardModel] | None" = None) -> "ForwardModel":
        """Another one (of a kind) of the same model and layout, with uninitialised memory of its
        own."""
        return (kind or ForwardModel)(
            self.model,
            self.device,
            parallel=self.parallel,
            tp_invariant=self.ranks.invariant,
            longest=self.longest,
            attention=type(self.attention),
        )

    @torch.no_grad()
    def copy_from(self, params: Mapping[str, Tensor]) -> None:
        """Take on the weights of these parameters, which are named alike."""
        for name, param in self.params.items():
            param.copy_(params[name])

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probs [R] of every micro-batch, on every rank that shares the work."""
        if not batches:
            return []
        shares = self._shares(batches)
        with torch.no_grad(), no_cuda():
            own = self._forward(batches, shares)
            if self.stage.count > 1:
                values = from_last_stage([x.cpu() for x in own], self.groups.pp)
                values = values[: len(batches)]
                own = [x.to(self.device) for x in values]
            return [
                found if share is None else gather_loss_rows(found, share, len(batch.rows))
                for found, share, batch in zip(own, shares, batches, strict=True)
            ]

    def with_kept_sets(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with kept sets in place of thresholds, good under other weights too.

        The present weights must be those that drew. Others than truncated ones stay as they are; a
        rank knows the sets of its own rows alone.
        """
        if not any(isinstance(batch.kept, Thresholds) for batch in batches):
            return list(batches)
        shares, found = self._shares(batches), list[KeptSets]()
        with torch.no_grad(), no_cuda():
            self._forward(batches, shares, found)
        if not self.stage.is_last:  # which never reads them
            found = [KeptSets.empty(len(batch.rows)) for batch in batches]
            shares = [None] * len(batches)
        return [
            replace(batch, kept=s if share is None else s.spread(share.rows, len(batch.rows)))
            for batch, share, s in zip(batches, shares, found[: len(batches)], strict=True)
        ]

    def _shares(self, batches: Sequence[MicroBatch]) -> list[ContextShare | None]:
        """This context rank's part of each micro-batch; None where it is the whole."""
        if self.context.size == 1:
            return [None] * len(batches)
        return [share_context(batch, self.context, self.attention) for batch in batches]

    def _forward(
        self,
        batches: Sequence[MicroBatch],
        shares: Sequence[ContextShare | None],
        sets: list[KeptSets] | None = None,
    ) -> Any:
        """Log-probs of this rank's rows; given `sets`, the kept sets of thresholds go there."""
        parts = [
            (batch if share is None else share.batch, share)
            for batch, share in zip(batches, shares, strict=True)
        ]

        def step(iterator: Any, gpt: Any) -> tuple[Tensor, Any]:
            batch, share = next(iterator)
            output = forward_logprobs(gpt, batch, self.model, share, found=sets)
            return output, lambda output, **_: output[0]

        options = {"forward_only": True, "collect_non_loss_data": True}
        return self.run_schedule(step, parts, **options)

    def run_schedule(
        self,
        step: Callable[[Iterator[Any], Any], tuple[Tensor, Any]],
        parts: Iterable[tuple[MicroBatch, Any]],
        **options: Any,
    ) -> Any:
        """Megatron's schedule for this pipeline: step(iterator over parts, chunk) each time."""
        full, chunks = filled_up(parts, self.stage), list(self._chunks)
        iterators = [iter(full) for _ in chunks]
        several = self.stage.num_chunks if self.stage.num_chunks > 1 else None
        return get_forward_backward_func(self.stage.count, several)(
            forward_step_func=step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(full),
            seq_length=max(batch.num_tokens for batch, _ in full),
            micro_batch_size=1,
            p2p_communicator=P2PCommunicator(self.groups.pp, chunks[0].config),
            pg_collection=self.groups,
            **options,
        )
