"""Pipeline parallel: which layers a process holds, and their names in the whole model.

A stage is one chunk of layers or, interleaved, several: chunk 0 of every stage, then chunk 1 of
every stage, and so on (Narayanan et al. 2021, arXiv 2104.04473). The last stage of a model with
tied embeddings holds a copy of the embedding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import EMBEDDING, OUTPUT
from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron.models.adapter import GPT, layer_of
from samebit.trainer.types import MicroBatch
from samebit.weight_sync.mapping import ParamSpec, Shard
from samebit.weight_sync.objects import gather_objects

FILLER = -1
"""Index of a micro-batch that counts for nothing."""


@dataclass(frozen=True)
class Stage:
    """This process in its pipeline."""

    index: int
    count: int
    num_layers: int
    """Of each chunk; all have as many."""
    num_chunks: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it holds the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes log-probs."""
        return self.index == self.count - 1

    def owner_of(self, layer: int) -> int:
        """Which stage holds a layer of the whole model."""
        return layer // self.num_layers % self.count

    def holds(self, layer: int) -> bool:
        """Whether a layer of the whole model is here."""
        return self.owner_of(layer) == self.index

    def first_layer(self, chunk: int) -> int:
        """Which layer of the whole model one of the chunks here begins with."""
        return (chunk * self.count + self.index) * self.num_layers

    def named_params(self, chunks: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
        """Parameters by their names in the whole model, which are the engine's."""
        return {
            GPT.engine_name(name, self.first_layer(i)): param
            for i, chunk in enumerate(chunks)
            for name, param in chunk.named_parameters()
        }


def stage_of(model: ModelConfig, pipeline: dist.ProcessGroup, parallel: ParallelConfig) -> Stage:
    """This process's stage. Raises ValueError for layers that the stages cannot share equally."""
    count, chunks = parallel.pipeline, parallel.virtual_pipeline
    return make_stage(model, dist.get_rank(pipeline), count, chunks, parallel.key)


def make_stage(
    model: ModelConfig, index: int, count: int, chunks: int, key: str = ParallelConfig.key
) -> Stage:
    """A stage of so many; ValueError, naming the section `key`, for layers that they cannot share
    equally."""
    if model.num_layers % (count * chunks):
        of_each = f" x virtual_pipeline = {count} x {chunks}" if chunks > 1 else f" is {count}"
        raise ValueError(
            f"{key}.pipeline{of_each}; it must divide the model's {model.num_layers} layers"
        )
    return Stage(index, count, model.num_layers // (count * chunks), chunks)


def filled_up[T](parts: Iterable[tuple[MicroBatch, T]], stage: Stage) -> list[tuple[MicroBatch, T]]:
    """The interleaved schedule takes a multiple of the stages: the shortest again, without loss."""
    full = list(parts)
    if stage.num_chunks > 1:
        batch, rest = min(full, key=lambda part: sum(part[0].seq_lens))
        filler = replace(batch, index=FILLER, loss_denominator=0), rest
        full += [filler] * (-len(full) % stage.count)
    return full


def stage_specs(model: ModelConfig, shard: Shard, stage: Stage) -> list[ParamSpec]:
    """Parameters of the stage, in forward order."""

    def here(spec: ParamSpec) -> bool:
        layer = layer_of(spec.name)
        if layer is not None:
            return stage.holds(layer)
        return stage.is_first if spec.name == EMBEDDING else stage.is_last

    specs = model.param_specs(shard)
    copies = []
    if model.tie_embeddings and stage.is_last and not stage.is_first:
        copies = [replace(spec, name=OUTPUT, replica=True) for spec in specs[:1]]
    return [*filter(here, specs), *copies]


def from_last_stage[T](value: T, pipeline: dist.ProcessGroup) -> T:
    """The last stage's plain value (weight_sync.objects), on every stage."""
    return gather_objects(value, pipeline)[-1]


def from_stage(index: int, tensor: Tensor, pipeline: dist.ProcessGroup) -> Tensor:
    """Rewrite the tensor, which is contiguous, with that of one stage; every stage calls it."""
    dist.broadcast(tensor, dist.get_global_rank(pipeline, index), group=pipeline)
    return tensor
