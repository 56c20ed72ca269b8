"""The AdamW behind Megatron's optimizers, and its exact state by parameter.

Megatron's distributed optimizer keeps moments out of its state_dict, and its own checkpoints of
them do not resume faithfully over torch's AdamW.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from torch import Tensor

from samebit.weight_sync.digest import Part

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """This rank's part of the optimizer's state of one parameter."""

    name: str
    start: int
    """The part's first element in the flattened parameter."""
    weights: Tensor
    """The part itself: live memory of the parameter."""
    main: Tensor
    """What AdamW updates: that memory, or an fp32 master copy of it."""
    group: dict[str, Any]
    """AdamW's settings for it."""
    state: dict[str, Tensor]
    """AdamW's step, its moments in main's shape and, offloaded, the master copy."""

    @property
    def has_master(self) -> bool:
        """Whether main is a copy."""
        return self.weights.dtype != self.main.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The moments and the master copy, if there is one."""
        found = {name: self.state[name] for name in MOMENTS}
        if self.has_master:
            found["master"] = self.state.get("master", self.main)
        return found

    @property
    def digested(self) -> Part:
        """What the weights' digest is computed from: the master copy, if there is one."""
        return Part(self.name, self.start, self.tensors.get("master", self.weights))


def host_zeros_like(tensor: Tensor) -> Tensor:
    """Zeros in the host's memory, pinned where the tensor is on a GPU."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def pieces_of(
    optimizer: Any, params: Mapping[str, Tensor], moments_on_host: bool = False
) -> list[Piece]:
    """This rank's pieces of a Megatron optimizer, with AdamW's state of all of them made.

    params: the live parameters by name.
    """
    zeros = host_zeros_like if moments_on_host else torch.zeros_like
    names = {param: name for name, param in params.items()}
    pieces = []
    for part in optimizers_in(optimizer):
        adam = part.optimizer
        for group in adam.param_groups:
            group["fused"] = any(main.is_cuda for main in group["params"]) or None
        group_of = {id(main): group for group in adam.param_groups for main in group["params"]}
        for param, weights, main, start in _held_by(part):
            step = torch.zeros((), device=main.device)
            moments = {name: zeros(main) for name in MOMENTS}
            adam.state[main] = {"step": step, **moments}
            group = group_of[id(main)]
            pieces.append(Piece(names[param], start, weights, main, group, adam.state[main]))
    return pieces


def optimizer_state(pieces: Sequence[Piece]) -> dict[str, dict[str, Any]]:
    """This rank's state by parameter, flat."""
    return {
        piece.name: {
            "start": piece.start,
            "step": piece.state["step"],
            **{name: tensor.detach().view(-1) for name, tensor in piece.tensors.items()},
        }
        for piece in pieces
    }


@torch.no_grad()
def load_optimizer_state(pieces: Sequence[Piece], state: Mapping[str, Mapping[str, Any]]) -> None:
    """Continue from what `optimizer_state` gave for the same model and layout, or ValueError."""
    here = {piece.name: (piece.start, *_sizes(piece.tensors)) for piece in pieces}
    there = {name: (saved["start"], *_sizes(saved)) for name, saved in state.items()}
    if here != there:
        name = min(n for n in {*here, *there} if here.get(n) != there.get(n))
        raise ValueError(
            f"the optimizer's state is another layout's: {name} is {there.get(name)} there, "
            f"{here.get(name)} here (start, sizes)"
        )
    for piece in pieces:
        saved = state[piece.name]
        piece.state["step"].copy_(saved["step"])
        for name, tensor in piece.tensors.items():
            tensor.copy_(saved[name].view_as(tensor))


def _sizes(state: Mapping[str, Any]) -> list[tuple[str, int]]:
    return sorted((name, x.numel()) for name, x in state.items() if name not in ("start", "step"))


def replace_step(optimizer: Any, step: Callable[[], None]) -> None:
    """Have `step` do what the AdamWs and the rounding of master weights do."""
    for part in optimizers_in(optimizer):
        part.optimizer.step = step
        # The first optimizer of a chain does it for all.
        part._copy_main_params_to_model_params = step = lambda: None


def optimizers_in(optimizer: Any) -> list[Any]:
    """The optimizers that it chains, or itself."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _held_by(part: Any) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """(parameter, this rank's part of it, what AdamW updates, its place) of one optimizer."""
    if isinstance(part, FP32Optimizer):
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                yield param, param.detach(), param, 0
    elif isinstance(part, DistributedOptimizer):
        low, full = part.model_float16_groups, part.model_fp32_groups
        shards, masters = part.shard_float16_groups, part.shard_fp32_from_float16_groups
        for param, shard, main in (
            *_flattened(low, shards, masters),
            *_flattened(full, part.shard_fp32_groups, part.shard_fp32_groups),
        ):
            start = part._get_model_param_range_map(param)["param"].start
            yield param, shard.detach(), main, start
    else:
        full = part.fp32_from_fp32_groups
        for param, main in (
            *_flattened(part.float16_groups, part.fp32_from_float16_groups),
            *_flattened(full, full),
        ):
            yield param, param.detach(), main, 0


def _flattened(*lists: list[list[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """Of equally long lists of equally long groups, the tensors side by side."""
    for groups in zip(*lists, strict=True):
        yield from zip(*groups, strict=True)
