"""A model whose output layer gives one number: the critic's shape, of any family."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import OUTPUT
from samebit.weight_sync.mapping import WHOLE, ParamSpec, Shard, plain

VALUE_HEAD = "score.weight"
"""transformers' name of it, in models for sequence or token classification."""


class ValueModel(ModelConfig):
    """Stands before a family's type: its parameters, but for a value head [1, D] as output.

    Every tensor parallel rank holds the head whole.
    """

    def param_specs(self, shard: Shard = WHOLE) -> list[ParamSpec]:
        """See ModelConfig."""
        head = plain(OUTPUT, VALUE_HEAD, (1, self.hidden_size), shard)
        return [*trunk(super().param_specs(shard)), head]  # type: ignore[safe-super]

    @property
    def num_matmul_weights(self) -> int:
        """See ModelConfig."""
        whole = super().num_matmul_weights
        return whole - self.hidden_size * (self.vocab_size - 1)


def trunk(specs: Iterable[ParamSpec]) -> list[ParamSpec]:
    """All but the output layer."""
    return [spec for spec in specs if spec.name != OUTPUT]


def value_model_of(model: ModelConfig) -> ModelConfig:
    """A model of the same family and sizes with a value head."""
    kind = type(model)
    made: Any = type(f"Value{kind.__name__}", (ValueModel, kind), {})
    values = {f.name: getattr(model, f.name) for f in fields(model)}
    return made(**values | {"tie_embeddings": False})
