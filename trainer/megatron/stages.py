"""Pipeline parallel: which layers a process holds, and their names in the whole model.

Megatron numbers the layers of a stage from 0; everybody else knows them by their place in the whole
model. The last stage of a model with tied embeddings holds a copy of the embedding.
"""

import re
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state

from samebit.kernels.reduce import gather_objects
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import EMBEDDING, OUTPUT, param_specs
from samebit.weight_sync.mapping import ParamSpec, Shard

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")


@dataclass(frozen=True)
class Stage:
    """This process in its pipeline."""

    index: int
    count: int
    num_layers: int
    """Of this stage; all have as many."""

    @property
    def is_first(self) -> bool:
        """Whether it holds the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes log-probs."""
        return self.index == self.count - 1

    def named_params(self, gpt: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Parameters by their names in the whole model, which are the engine's."""
        first = self.index * self.num_layers

        def whole(name: str) -> str:
            return _LAYER.sub(lambda found: str(int(found.group()) + first), name)

        return {whole(name): param for name, param in gpt.named_parameters()}


def stage_of(model: ModelConfig) -> Stage:
    """This process's stage. Raises ValueError for layers that the stages cannot share equally."""
    count = parallel_state.get_pipeline_model_parallel_world_size()
    if model.num_layers % count:
        raise ValueError(
            f"trainer.parallel.pipeline is {count}; it must divide the model's {model.num_layers} "
            "layers"
        )
    index = parallel_state.get_pipeline_model_parallel_rank()
    return Stage(index, count, model.num_layers // count)


def stage_specs(model: ModelConfig, shard: Shard, stage: Stage) -> list[ParamSpec]:
    """Parameters of the stage, in forward order."""

    def here(spec: ParamSpec) -> bool:
        found = _LAYER.search(spec.name)
        if found is not None:
            return int(found.group()) // stage.num_layers == stage.index
        return stage.is_first if spec.name == EMBEDDING else stage.is_last

    specs = param_specs(model, shard)
    copies = []
    if model.tie_embeddings and stage.is_last and not stage.is_first:
        copies = [replace(spec, name=OUTPUT, replica=True) for spec in specs[:1]]
    return [*filter(here, specs), *copies]


def from_last_stage[T](value: T) -> T:
    """The last stage's picklable value, on every stage."""
    return gather_objects(value, parallel_state.get_pipeline_model_parallel_group())[-1]
