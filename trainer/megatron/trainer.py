"""The Megatron trainer: micro-batches in, one optimizer step out.

Order of a step: forward and backward of every micro-batch, finiteness checks, clipping, AdamW,
learning-rate schedule. Nothing is written to the weights before the checks have passed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import AttentionKind
from samebit.kernels.memory import Arena
from samebit.kernels.reduce import RankGroup
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.algorithms.base import Algorithm, LossInputs, LossOutputs
from samebit.trainer.config import OptimizerConfig, ParallelConfig
from samebit.trainer.context import share_context
from samebit.trainer.megatron.blame import blame_gradients
from samebit.trainer.megatron.cpu import no_cuda
from samebit.trainer.megatron.forward import ForwardModel
from samebit.trainer.megatron.grad_norm import clip_gradients
from samebit.trainer.megatron.grad_segments import GradSegments
from samebit.trainer.megatron.main_grad import own_gradients
from samebit.trainer.megatron.memory import TrainerMemory, gradients_in, hold, optimizer_in
from samebit.trainer.megatron.model import forward_logprobs
from samebit.trainer.megatron.offload import OffloadedState
from samebit.trainer.megatron.offloaded_model import OffloadedModel
from samebit.trainer.megatron.optimizer_settings import lr_scheduler, make_optimizer
from samebit.trainer.megatron.optimizer_state import (
    load_optimizer_state,
    optimizer_state,
    pieces_of,
    replace_step,
)
from samebit.trainer.megatron.parallel import ranks_of
from samebit.trainer.megatron.resharding import WholeState
from samebit.trainer.megatron.setup import be_deterministic
from samebit.trainer.megatron.stages import FILLER, from_last_stage, stage_specs
from samebit.trainer.megatron.streams import StreamObserver, StreamView
from samebit.trainer.packing import share_batches
from samebit.trainer.stats import Totals, merged
from samebit.trainer.types import MicroBatch, NonFiniteError, StepStats
from samebit.weight_sync.digest import Digester, as_digest
from samebit.weight_sync.mapping import ParamSpec
from samebit.weight_sync.objects import gather_objects


class MegatronTrainer(ForwardModel, TrainerMemory):
    """Policy, optimizer and schedule of one process, which holds its shard of them.

    `params` keep their memory for the trainer's whole life, so an engine may be bound to them.
    """

    observer: StreamObserver | None = None
    """Who is shown the residual streams of what train_step computes; on all ranks or on none."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        num_steps: int,
        device: torch.device,
        parallel: ParallelConfig | None = None,
        tp_invariant: bool = False,
        longest: int | None = None,
        attention: type[AttentionKind] = CanonicalAttention,
        releasable: bool = False,
        arena: Arena | None = None,
        grad_segments: int = 0,
    ) -> None:
        """releasable: gradients and optimizer are allocated so that they can be released. arena:
        another trainer's, by which both release theirs together. grad_segments: how many; 0:
        gradients are Megatron's sums."""
        if grad_segments:
            be_deterministic()
        super().__init__(model, device, None, parallel, tp_invariant, longest, attention)
        self.arena = arena or Arena(self.device, releasable)
        offloaded = self.parallel.offload_optimizer
        self.specs = stage_specs(model, self.ranks.shard, self.stage)
        self.step = 0
        config = self._chunks[0].config
        if self.parallel.overlap_grad_reduce:
            own_gradients(self.params.values())
        with no_cuda(), gradients_in(self.arena):
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=self.parallel.overlap_grad_reduce,
                average_in_collective=False,
                use_distributed_optimizer=self.parallel.distributed_optimizer,
            )
            self._chunks = [
                DistributedDataParallel(config, ddp_config, gpt, pg_collection=self.groups)
                for gpt in self._chunks
            ]
        with no_cuda(), optimizer_in(self.arena, offloaded):
            self._optimizer = make_optimizer(self._chunks, optimizer, self.parallel, self.groups)
            self._scheduler = lr_scheduler(self._optimizer, optimizer, num_steps)
            self._pieces = pieces_of(self._optimizer, self.params, moments_on_host=offloaded)
        hold(self.arena, self._chunks, self._pieces, offloaded)
        config.grad_scale_func = self._optimizer.scale_loss
        no_syncs = [chunk.no_sync for chunk in self._chunks]
        config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
        config.finalize_model_grads_func = None if grad_segments else finalize_model_grads
        layout = self._chunks, self.params, self.groups, self.parallel, self.arena
        self._segments = GradSegments(grad_segments, *layout) if grad_segments else None
        self.grad_segments = grad_segments
        digester_of = partial(Digester, self.specs, self.params)
        self._offloaded = OffloadedState(self._pieces, digester_of) if offloaded else None
        if self._offloaded:
            replace_step(self._optimizer, self._offloaded.step)
            self._digest_sum = self._offloaded.digest_sum
        else:
            self._digest_sum = digester_of([piece.digested for piece in self._pieces]).sum
        self._reference: ForwardModel | None = None

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The processes that hold the other layers of this model."""
        return self.groups.pp

    @property
    def data_ranks(self) -> RankGroup:
        """This process among the copies of the model, each with samples of its own."""
        return ranks_of(self.groups.dp)

    def own_batches(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Of a step's micro-batches, those of this process's copy of the model."""
        if self._segments is not None:
            return [batch for batch in batches if batch.segment in self._segments.own]
        return share_batches(batches, self.parallel.data)[self.data_ranks.rank]

    def fill(self, load: Callable[[Sequence[ParamSpec], Mapping[str, Tensor]], None]) -> None:
        """Have `load(specs, params)` write a full set of weights, and tell the optimizer."""
        self.arena.require_resident(("optimizer",))
        with torch.no_grad(), no_cuda():
            load(self.specs, self.params)
            (self._offloaded or self._optimizer).reload_model_params()

    def freeze_reference(self) -> None:
        """Keep a copy of the present weights as the reference, in place of an earlier one."""
        self._reference_model().copy_from(self.params)

    def _reference_model(self) -> ForwardModel:
        """Made when first asked for."""
        kind = OffloadedModel if self.parallel.offload_reference else ForwardModel
        self._reference = self._reference or self.like(kind)
        return self._reference

    def digest(self) -> str:
        """weights_digest of the weights that the optimizer means, on every rank: of its master
        copies, rounded, where it has them. The weights themselves are not read then.

        Raises ReleasedError while the optimizer's memory is released.
        """
        self.arena.require_resident(("optimizer",))
        copy = dist.get_rank(self.groups.dp_cp)
        counts = copy == 0 or self.parallel.distributed_optimizer
        return as_digest(gather_objects(self._digest_sum() if counts else 0))

    def logprobs(self, batches: Sequence[MicroBatch], reference: bool = False) -> list[Tensor]:
        """Log-probs [R] of every micro-batch, without gradients."""
        if not reference:
            return super().logprobs(batches)
        if self._reference is None:
            raise RuntimeError("no reference model; call freeze_reference first")
        return self._reference.logprobs(self.with_kept_sets(batches))

    def mean_nll(self, batches: Sequence[MicroBatch]) -> float:
        """Mean negative log-likelihood, in nats, of the loss rows of every data rank's batches."""
        own = self.logprobs(batches)
        sums = [float(x.double().sum()) for x in own], sum(len(x) for x in own)
        found, counts = zip(*gather_objects(sums, self.groups.dp), strict=True)
        return -math.fsum(chain(*found)) / sum(counts)

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        algorithm: Algorithm[Any],
        poll: Callable[[], object] | None = None,
        before_write: Callable[[], object] | None = None,
    ) -> StepStats:
        """One optimizer step over all micro-batches: this data rank's, at least one unless there
        are gradient segments.

        Truncated ones need kept sets (`with_kept_sets`) unless the weights are those that drew.
        `poll` is called before each of them, `before_write` once gradients are known to be finite;
        what they raise ends the step, nothing being written.
        Raises NonFiniteError, with step, micro-batch and sample named, before anything is written;
        on every rank alike.
        """
        self.arena.require_resident()
        with no_cuda():
            references = self._references(batches, algorithm)
            totals = self._forward_backward(batches, algorithm, references, poll)
            for failure in filter(None, gather_objects(self._failure)):
                raise NonFiniteError(failure)
            self._require_finite_gradients(batches, algorithm)
            self._optimizer.prepare_grads()
            norm = clip_gradients(self._optimizer, exactly=self._segments is not None)
            learning_rate = self._optimizer.param_groups[0]["lr"]
            if not math.isfinite(norm):
                raise NonFiniteError(
                    f"the gradient's norm overflows at step {self.step + 1}, although every "
                    "gradient is finite; the weights are unchanged"
                )
            if before_write is not None:
                before_write()
            self._optimizer.step_with_ready_grads()
            self._scheduler.step(increment=1)
        self.step += 1
        own = {segment: vars(each) for segment, each in totals.items()}
        first = merged(gather_objects(own, self.groups.dp_cp), self.grad_segments or 1)
        found = from_last_stage(vars(first), self.groups.pp)  # the others compute no losses
        return Totals(**found).stats(float(norm), learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, exactly: this rank's part of it."""
        self.arena.require_resident(("optimizer",))
        return {
            "step": self.step,
            "tensor": self.ranks.shard,
            "stage": (self.stage.index, self.stage.count, self.stage.num_chunks),
            "params": {name: p.detach() for name, p in self.params.items()},
            "optimizer": optimizer_state(self._pieces),
            "scheduler": self._scheduler.state_dict(),
            "reference": None
            if self._reference is None
            else {name: p.detach() for name, p in self._reference.params.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, written by state_dict with the same settings."""
        self.arena.require_resident(("optimizer",))
        self.copy_from(state["params"])
        load_optimizer_state(self._pieces, state["optimizer"])
        self._go_on_from(state)
        if state["reference"] is not None:
            self._reference_model().copy_from(state["reference"])

    @torch.no_grad()
    def load_resharded(self, saved: WholeState) -> None:
        """Continue from the states of all ranks of any layout; bits then follow this one's."""
        self.arena.require_resident(("optimizer",))
        saved.fill("params", self.specs, self.params)
        load_optimizer_state(self._pieces, saved.optimizer_state(self.specs, self._pieces))
        self._go_on_from(saved.first)
        if saved.first["reference"] is not None:
            saved.fill("reference", self.specs, self._reference_model().params)

    def _go_on_from(self, state: Mapping[str, Any]) -> None:
        """What is the same on every rank."""
        self.step = state["step"]
        if self._offloaded:
            self._offloaded.forget_digest()
        self._scheduler.num_steps = 0  # Megatron adds the saved count to the present one
        self._scheduler.load_state_dict(state["scheduler"])

    def _forward_backward(
        self,
        batches: Sequence[MicroBatch],
        algorithm: Algorithm[Any],
        references: Sequence[Tensor | None] | None,
        poll: Callable[[], object] | None = None,
    ) -> Mapping[int, Totals]:
        """Accumulate gradients over the micro-batches into Megatron's buffers; totals by segment,
        which is 0 where there are none."""
        totals = defaultdict[int, Totals](Totals)
        self._failure: str | None = None
        self._optimizer.zero_grad()
        view = None
        if self.observer is not None:
            place = self.stage, self.ranks, self.groups.pp
            view = StreamView(self.observer, self._chunks, *place)

        def forward_step(iterator: Any, gpt: Any) -> tuple[Tensor, Any]:
            if poll is not None:
                poll()
            whole, reference = next(iterator)
            batch, share = whole, None
            if self.context.size > 1:
                share = share_context(batch, self.context, self.attention)
                batch = share.batch
                reference = None if reference is None else reference[share.rows]
            entropy_grad = algorithm.needs_entropy_grad
            with view.watching(gpt, whole, share) if view else nullcontext():
                output = forward_logprobs(gpt, batch, self.model, share, entropy_grad)
            return output, partial(self._loss, batch, algorithm, reference, totals)

        def run(parts: Iterable[tuple[MicroBatch, Any]]) -> None:
            for chunk in self._chunks:
                chunk.zero_grad_buffer()
            self.run_schedule(forward_step, parts, forward_only=False)
            if view:
                view.finish()

        parts = list(zip(batches, references or [None] * len(batches), strict=True))
        run(parts) if self._segments is None else self._segments.sum_up(parts, run)
        return totals

    def _loss(
        self,
        batch: MicroBatch,
        algorithm: Algorithm[Any],
        reference: Tensor | None,
        totals: Mapping[int, Totals],
        output: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Megatron's loss function: (summed loss, its denominator, nothing to report)."""
        if batch.index == FILLER:
            return output[0].sum() * 0, torch.tensor(0, dtype=torch.int), {}
        found = self._found(batch, algorithm, reference, output)
        losses = found.losses
        finite = losses.detach().isfinite()
        if not bool(finite.all()):
            # Told once the schedule is through: the other ranks wait in it for this one.
            sample = batch.samples[int(batch.sample_of_row[~finite][0])]
            self._failure = self._failure or (
                f"loss is NaN or Inf at step {self.step + 1}, micro-batch {batch.index}, sample "
                f"{sample.sample_id}; the weights are unchanged"
            )
        total = (losses * batch.loss_weights).sum()
        totals[batch.segment].add(batch, output[0].detach(), total.detach(), found.metrics)
        return total, torch.tensor(batch.loss_denominator, dtype=torch.int), {}

    def _references(
        self, batches: Sequence[MicroBatch], algorithm: Algorithm[Any]
    ) -> Sequence[Tensor] | None:
        """What the loss compares rows with: [R, ...] of every micro-batch, all context ranks'."""
        return self.logprobs(batches, reference=True) if algorithm.needs_reference else None

    def _found(
        self,
        batch: MicroBatch,
        algorithm: Algorithm[Any],
        reference: Tensor | None,
        output: Tensor,
    ) -> LossOutputs:
        """The algorithm's losses and metrics of a micro-batch's rows, given the model's output."""
        entropies = output[1] if algorithm.needs_entropy_grad else output[1].detach()
        inputs = LossInputs(
            batch=batch,
            logprobs=output[0],
            entropies=entropies,
            ref_logprobs=reference,
            teacher_kl=output[2] if batch.teacher_top is not None else None,
            context=self.context,
        )
        found = algorithm.checked_loss(inputs)
        metrics = found.metrics | {"train/entropy": entropies.detach()}
        return LossOutputs(found.losses, metrics)

    def _gradients_finite(self) -> bool:
        """Whether they are on every rank: all must take the same way from here."""
        buffers = [buffer for chunk in self._chunks for buffer in chunk.buffers]
        # NaN passes through both; one pass over the memory, without temporaries.
        bounds = [bound for buffer in buffers for bound in buffer.grad_data.aminmax()]
        return all(gather_objects(bool(torch.stack(bounds).isfinite().all())))

    def _require_finite_gradients(
        self, batches: Sequence[MicroBatch], algorithm: Algorithm[Any]
    ) -> None:
        if self._gradients_finite():
            return
        if self.parallel.data > 1:
            raise NonFiniteError(
                f"a gradient is NaN or Inf at step {self.step + 1}; the weights are unchanged"
            )

        def are_finite(some: Sequence[MicroBatch]) -> bool:
            self._forward_backward(some, algorithm, self._references(some, algorithm))
            return self._gradients_finite()

        blame_gradients(batches, self.step + 1, self.device, are_finite)
