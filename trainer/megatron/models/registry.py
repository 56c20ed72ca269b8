"""How Megatron builds a model: by the nearest of its types that is listed here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import DenseModel
from samebit.trainer.megatron.models import dense


@dataclass(frozen=True)
class MegatronParts:
    """What Megatron has to be told of a type of models."""

    settings: Callable[[Any], dict[str, Any]]
    """model -> keys of Megatron's configuration."""
    layers: Callable[[Any, int, int, torch.device], TransformerBlockSubmodules]
    """(model, layers of a chunk, tokens of the longest sample, device) -> those layers."""


PARTS: dict[type[ModelConfig], MegatronParts] = {
    DenseModel: MegatronParts(dense.settings, dense.layers),
}


def parts_of(model: ModelConfig) -> MegatronParts:
    """The parts of a model's own type, or of the nearest that it is derived from.

    Raises ValueError for a model that cannot be trained.
    """
    for kind in type(model).__mro__:
        if kind in PARTS:
            return PARTS[kind]
    raise ValueError(f"{model.architecture} has no Megatron parts: it can be served, not trained")
