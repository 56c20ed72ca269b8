"""The residual streams of a forward that is made anyway, shown to whoever trains on them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor

from samebit.kernels.reduce import RankGroup, gather_rows
from samebit.trainer.types import MicroBatch


class StreamObserver(Protocol):
    """Who is shown what a trainer's forward computes of each micro-batch."""

    streams: tuple[int, ...]
    """By number of layers before: which residual streams; 0 is the embeddings."""

    def observe(self, batch: MicroBatch, streams: Mapping[int, Tensor]) -> None:
        """Take a micro-batch's streams, each [T, D], before its backward and before any weight is
        written; they are not to be changed."""


@contextmanager
def observed(
    gpt: Any, batch: MicroBatch, observer: StreamObserver | None, ranks: RankGroup
) -> Iterator[None]:
    """Within the block the micro-batch is computed once; at its end the observer is shown it.

    gpt: a GPTModel of all layers, or Megatron's DDP around one; ranks: those that share its layers,
    which all observe. What the backward computes again (recompute) is not seen: the hooks are gone
    by then.
    """
    if observer is None:
        yield
        return
    layers = getattr(gpt, "module", gpt).decoder.layers
    found: dict[int, Tensor] = {}

    def keep(layer: int, stream: Tensor) -> None:
        found[layer] = stream.detach().squeeze(1)  # Megatron's [T, 1, D]

    def entering(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    with ExitStack() as hooks:
        for layer in observer.streams:
            if layer == 0:
                hook = layers[0].register_forward_pre_hook(entering, with_kwargs=True)
            else:
                hook = layers[layer - 1].register_forward_hook(
                    lambda _module, _args, output, layer=layer: keep(layer, output[0])
                )
            hooks.callback(hook.remove)
        yield
    if ranks.size > 1 and gpt.config.sequence_parallel:  # a rank has its part of the tokens
        found = {i: gather_rows(found[i], ranks)[: batch.num_tokens] for i in observer.streams}
    observer.observe(batch, found)
