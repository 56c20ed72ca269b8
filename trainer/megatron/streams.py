"""The residual streams of a forward that is made anyway, shown to whoever trains on them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.kernels.reduce import RankGroup, gather_rows
from samebit.trainer.context import ContextShare
from samebit.trainer.megatron.parallel import gather_context
from samebit.trainer.megatron.stages import FILLER, Stage, from_stage
from samebit.trainer.types import MicroBatch


class StreamObserver(Protocol):
    """Who is shown what a trainer's forward computes of each micro-batch."""

    streams: tuple[int, ...]
    """By number of layers before: which residual streams; 0 is the embeddings."""

    def observe(self, batch: MicroBatch, streams: Mapping[int, Tensor]) -> None:
        """Take a whole micro-batch's streams, each [T, D], before any weight is written; they are
        not to be changed. All ranks that share its layers or its tokens are shown it, alike."""


@dataclass
class _Kept:
    """What this stage has computed of a micro-batch."""

    batch: MicroBatch
    share: ContextShare | None
    parts: dict[int, Tensor] = field(default_factory=dict)
    """Streams [T, 1, D], or of this rank's tokens, by number of layers before."""


class StreamView:
    """Shows an observer each micro-batch of a schedule once, in the schedule's order.

    Without a pipeline one is shown as it is computed, before its backward. Stages keep their
    streams until the schedule is through, and then show them to each other micro-batch by
    micro-batch: within it one stage may wait for another in Megatron's order alone.
    """

    def __init__(
        self,
        observer: StreamObserver,
        chunks: Sequence[Any],
        stage: Stage,
        ranks: RankGroup,
        pipeline: dist.ProcessGroup,
    ) -> None:
        """chunks: this stage's GPTModels, or Megatron's DDPs around them; ranks: those that share
        its layers; pipeline: its stages."""
        self._observer, self._chunks = observer, chunks
        self._stage, self._ranks, self._pipeline = stage, ranks, pipeline
        self._kept: dict[int, _Kept] = {}

    @contextmanager
    def watching(self, gpt: Any, batch: MicroBatch, share: ContextShare | None) -> Iterator[None]:
        """Within the block one of the chunks computes a micro-batch, or this rank's share of it.

        What the backward computes again (recompute) is not seen: the hooks are gone by then.
        """
        if batch.index == FILLER:
            yield
            return
        layers = getattr(gpt, "module", gpt).decoder.layers
        first = self._stage.first_layer(self._chunks.index(gpt))
        kept = self._kept.setdefault(batch.index, _Kept(batch, share))

        def keep(layer: int, stream: Tensor) -> None:
            kept.parts[layer] = stream.detach()

        def entering(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(0, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        with ExitStack() as hooks:
            for layer in self._observer.streams:
                place = made_by(layer) - first
                if not 0 <= place < len(layers):
                    continue
                if layer == 0:
                    hook = layers[0].register_forward_pre_hook(entering, with_kwargs=True)
                else:
                    hook = layers[place].register_forward_hook(
                        lambda _module, _args, output, layer=layer: keep(layer, output[0])
                    )
                hooks.callback(hook.remove)
            yield
        if self._stage.count == 1:
            self._show(self._kept.pop(batch.index))

    def finish(self) -> None:
        """The schedule is through: show what has been kept, if any. All stages call it."""
        for index in list(self._kept):
            self._show(self._kept.pop(index))

    def _show(self, kept: _Kept) -> None:
        streams = {layer: self._whole(kept, layer) for layer in self._observer.streams}
        self._observer.observe(kept.batch, streams)

    def _whole(self, kept: _Kept, layer: int) -> Tensor:
        """A stream [T, D] of all ranks' tokens, from the stage that has computed it."""
        owner, config = self._stage.owner_of(made_by(layer)), self._chunks[0].config
        num_tokens = kept.batch.num_tokens
        if owner == self._stage.index:
            whole = gather_context(kept.parts[layer].squeeze(1), kept.share)
            if self._ranks.size > 1 and config.sequence_parallel:  # a rank has a part of the tokens
                whole = gather_rows(whole, self._ranks)[:num_tokens]
        else:
            shape = num_tokens, config.hidden_size
            device = kept.batch.input_ids.device
            whole = torch.empty(shape, dtype=config.params_dtype, device=device)
        if self._stage.count == 1:
            return whole
        return from_stage(owner, whole.contiguous(), self._pipeline)


def made_by(layer: int) -> int:
    """The layer in whose forward the stream after so many layers is seen."""
    return max(0, layer - 1)
