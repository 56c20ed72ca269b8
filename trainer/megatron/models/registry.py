"""How Megatron builds a model: by the nearest of its types that is listed here.

A module of this folder has `settings(model)`, keys of Megatron's configuration, and
`layers(model, num_layers, longest, device)`, those of one chunk: see dense.py.
"""

from types import ModuleType

from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import DenseModel
from samebit.trainer.megatron.models import dense

PARTS: dict[type[ModelConfig], ModuleType] = {
    DenseModel: dense,
}


def parts_of(model: ModelConfig) -> ModuleType:
    """The module of a model's own type, or of the nearest that it is derived from.

    Raises ValueError for a model that cannot be trained.
    """
    for kind in type(model).__mro__:
        if kind in PARTS:
            return PARTS[kind]
    raise ValueError(f"{model.architecture} has no Megatron parts: it can be served, not trained")
