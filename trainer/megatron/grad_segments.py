"""Gradients that are summed in one order, whatever the number of copies of the model.

The samples of an optimizer step form S segments (trainer/packing.py). A segment's gradient is
summed by itself, micro-batch after micro-batch. The S sums are added by one binary tree, neighbours
first: its lower branches on the rank that has computed them, the upper ones between data ranks.
Context ranks' totals are added last, in rank order. torch.distributed moves data and adds nothing,
but for two summands. Contract: docs/contract.md.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from samebit.kernels.contract import tree_sum
from samebit.kernels.memory import Arena
from samebit.kernels.reduce import gather_rows, reduce_ref
from samebit.trainer.config import ParallelConfig, check_grad_segments
from samebit.trainer.megatron.main_grad import grad_buffer
from samebit.trainer.megatron.optimizer_state import host_zeros_like
from samebit.trainer.megatron.parallel import ranks_of
from samebit.trainer.types import MicroBatch
from samebit.weight_sync.objects import gather_objects

SLICE = 1 << 24
"""Elements that a rank sends the others at a time, and those that come from the host at once."""

_QK_NORMS = ("q_layernorm", "k_layernorm")


class GradSegments:
    """The gradient buffers of Megatron's DDPs, and the sums of segments that wait for others.

    A rank of D has S / D neighbouring segments and so keeps log2(S / D) sums beside the buffers,
    in the arena's gradients or, with offload_segment_sums, in the host's memory. Raises ValueError
    for a layout that `num_segments` does not go with.
    """

    def __init__(
        self,
        num_segments: int,
        chunks: Sequence[Any],
        params: Mapping[str, Tensor],
        groups: ProcessGroupCollection,
        parallel: ParallelConfig,
        arena: Arena,
    ) -> None:
        check_grad_segments(num_segments, parallel)
        self._chunks, self._params, self._groups = chunks, params, groups
        self._parallel, self._group = parallel, groups.dp_cp
        self._rank, data = dist.get_rank(groups.dp_cp), dist.get_rank(groups.dp)
        assert self._rank // parallel.context == data, "context ranks are neighbours in the group"
        own = num_segments // parallel.data
        self.own = range(data * own, (data + 1) * own)
        """The segments that this rank computes."""
        buckets = [b for chunk in chunks for group in chunk.bucket_groups for b in group.buckets]
        self._sums: list[Tensor] = [bucket.grad_data for bucket in buckets]
        self._waiting = [self._like_sums(arena) for _ in range(own.bit_length() - 1)]

    def _like_sums(self, arena: Arena) -> list[Tensor]:
        if self._parallel.offload_segment_sums:
            return [host_zeros_like(x) for x in self._sums]
        with arena.allocating("gradients"):
            made = [torch.empty_like(x) for x in self._sums]
        arena.hold("gradients", made)
        return made

    @torch.no_grad()
    def sum_up[T](
        self,
        parts: Sequence[tuple[MicroBatch, T]],
        run: Callable[[Sequence[tuple[MicroBatch, T]]], None],
    ) -> None:
        """Leave the mean loss's gradient in Megatron's buffers: with the distributed optimizer only
        this rank's part of it. `run` leaves there the sum of some micro-batches', in their order.

        parts: this rank's micro-batches of a whole optimizer step. Every rank must call it.
        """
        for place, segment in enumerate(self.own):
            if own := [part for part in parts if part[0].segment == segment]:
                with torch.enable_grad():
                    run(own)
            else:
                for total in self._sums:
                    total.zero_()
            level = 0  # of the tree: two complete branches are added as soon as there are two
            while place >> level & 1:
                for total, left in zip(self._sums, self._waiting[level], strict=True):
                    for a, b in zip(total.split(SLICE), left.split(SLICE), strict=True):
                        a.add_(b.to(a.device))
                level += 1
            if level < len(self._waiting):
                for left, total in zip(self._waiting[level], self._sums, strict=True):
                    left.copy_(total)
        denominator = sum(batch.loss_denominator for batch, _ in parts)
        denominators = gather_objects(denominator, self._groups.dp)
        for total in self._sums:
            if dist.get_world_size(self._group) > 1:
                self._sum_over_copies(total)
        self._sum_norms()
        self._sum_tied_embedding()
        for total in self._sums:
            total.div_(sum(denominators))

    def _sum_over_copies(self, grads: Tensor) -> None:
        """Each rank adds one part, which all send it; then all get all parts, if they need them."""
        size, data = dist.get_world_size(self._group), self._parallel.data
        share = -(-len(grads) // size)  # Megatron's, where the optimizer is distributed
        step = max(1, SLICE // size)
        for start in range(0, share, step):
            stop = min(start + step, share)
            # The last one may be shorter, or empty.
            parts = [grads[r * share + start : r * share + stop] for r in range(size)]
            sent = grads.new_zeros(size, stop - start)
            for row, part in zip(sent, parts, strict=True):
                row[: len(part)] = part
            found = torch.empty_like(sent)
            dist.all_to_all_single(found, sent, group=self._group)
            copies = tree_sum(list(found.view(data, size // data, stop - start)))
            total = reduce_ref(list(copies), torch.float32)
            if self._parallel.distributed_optimizer:
                parts[self._rank].copy_(total[: len(parts[self._rank])])
                continue
            dist.all_gather_into_tensor(found.view(-1), total, group=self._group)
            for row, part in zip(found, parts, strict=True):
                part.copy_(row[: len(part)])

    def _sum_norms(self) -> None:
        """Of weights that each tensor rank holds whole and uses for its heads or tokens alone."""
        ranks = ranks_of(self._groups.tp)
        if ranks.size == 1:
            return
        qk_norm, sequence = self._chunks[0].config.qk_layernorm, self._parallel.sequence
        grads = [
            grad_buffer(param)
            for name, param in self._params.items()
            if (sequence and getattr(param, "sequence_parallel", False))
            or (qk_norm and any(norm in name for norm in _QK_NORMS))
        ]
        if grads:
            flat = torch.cat([grad.view(-1) for grad in grads])
            total = reduce_ref(list(gather_rows(flat[None], ranks)), torch.float32)
            for grad, part in zip(grads, total.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def _sum_tied_embedding(self) -> None:
        """The first stage's and the last one's, of which each holds a copy: two summands."""
        for chunk in self._chunks:
            gpt = chunk.module
            if gpt.share_embeddings_and_output_weights and gpt.pre_process != gpt.post_process:
                weight = gpt.shared_embedding_or_output_weight()
                dist.all_reduce(grad_buffer(weight), group=self._groups.embd)
