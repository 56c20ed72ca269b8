"""A checkpoint of any layout, put together again: for export, and to go on under another layout.

Weights, moments and master weights are cut alike: one description of the shards
(weight_sync.mapping) serves them all. The bits of the steps that follow are the new layout's.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from samebit.rollout.models.config import ModelConfig
from samebit.trainer.megatron.optimizer_state import Piece
from samebit.trainer.megatron.stages import make_stage, stage_specs
from samebit.weight_sync.mapping import (
    ParamSpec,
    collect_hf,
    load_params,
    parts_of,
    unequal_shapes,
)

_WHOLE = ("params", "reference")
"""Fields of a state that hold a rank's parameters whole; the others are flat parts."""


class WholeState:
    """The states of all ranks as one. Raises ValueError if they are not the model's.

    Tensors are read when asked for, one Hugging Face tensor at a time.
    """

    def __init__(self, model: ModelConfig, states: Iterable[Mapping[str, Any]]) -> None:
        self._holders: dict[str, list[tuple[ParamSpec, list[Mapping[str, Any]]]]] = {}
        self._cached: tuple[str, dict[str, Tensor]] = ("", {})
        copies = defaultdict(list)
        self._states = list(states)
        for state in self._states:
            copies[state["tensor"], state["stage"]].append(state)
        self.first = next(iter(copies.values()))[0]
        for (tensor, stage), same in copies.items():
            specs = stage_specs(model, tensor, make_stage(model, *stage))
            for state in same:
                for name, (there, here) in unequal_shapes(specs, state["params"]).items():
                    raise ValueError(
                        f"the checkpoint holds another model's parameters: {name} is {there} "
                        f"there, {here} here"
                    )
            for spec in specs:
                for hf_name in spec.hf_shapes:
                    self._holders.setdefault(hf_name, []).append((spec, same))

    def part(self, field: str, model: ModelConfig) -> "WholeState":
        """The states of another model that every rank has inside its own, such as a critic's."""
        return WholeState(model, [state[field] for state in self._states])

    def read(self, field: str, hf_name: str) -> Tensor:
        """A whole Hugging Face tensor of a field: "params", "reference", a moment or "master"."""
        if self._cached[0] != field or hf_name not in self._cached[1]:
            self._cached = (field, {})
            for spec, copies in self._holders[hf_name]:
                collect_hf([spec], {spec.name: _shard(field, spec, copies)}, self._cached[1])
        return self._cached[1][hf_name]

    def fill(self, field: str, specs: Iterable[ParamSpec], params: Mapping[str, Tensor]) -> None:
        """Write one field into the shards that `specs` describe."""
        load_params(specs, params, parts_of(partial(self.read, field)))

    def optimizer_state(
        self, specs: Iterable[ParamSpec], pieces: Iterable[Piece]
    ) -> dict[str, dict[str, Any]]:
        """What load_optimizer_state takes, for these pieces of the shards."""
        spec_of = {spec.name: spec for spec in specs}
        step = next(iter(self.first["optimizer"].values()))["step"]
        state: dict[str, dict[str, Any]] = {}
        for piece in pieces:
            spec = spec_of[piece.name]
            state[piece.name] = {"start": piece.start, "step": step}
            for field, tensor in piece.tensors.items():
                shard = torch.empty(spec.shape)
                self.fill(field, [spec], {spec.name: shard})
                part = shard.view(-1)[piece.start : piece.start + tensor.numel()]
                state[piece.name][field] = part.clone()
        return state


def _shard(field: str, spec: ParamSpec, copies: list[Mapping[str, Any]]) -> Tensor:
    """One tensor of a shard, whose flat parts may be spread over copies of the model."""
    if field in _WHOLE:
        return copies[0][field][spec.name]
    pieces = [s["optimizer"][spec.name] for s in copies if spec.name in s["optimizer"]]
    parts = {piece["start"]: piece[field] for piece in pieces}  # copies may have the same one
    whole = torch.cat([parts[start] for start in sorted(parts)]) if parts else torch.empty(0)
    if whole.numel() != math.prod(spec.shape):
        raise ValueError(
            f"the checkpoint holds {whole.numel()} numbers of {field} of {spec.name}, which has "
            f"{math.prod(spec.shape)}"
        )
    return whole.view(spec.shape)
