"""The AdamW behind Megatron's optimizers, and its exact state: what a resumed run needs to take the
same steps to the same bits.

Megatron's distributed optimizer keeps moments out of its state_dict, and its own checkpoints of
them do not resume faithfully over torch's AdamW. Its shards and the AdamW behind it are plain
tensors, though: they are kept as they are, per rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """This rank's state of a Megatron optimizer, master weights included."""
    distributed = _distributed(optimizer)
    if not distributed:
        return optimizer.state_dict()
    # Shards of fp32 models are parts of the parameters themselves, which are kept elsewhere.
    return {
        "adam": [part.optimizer.state_dict() for part in distributed],
        "master_weights": [p.detach() for p in _master_shards(distributed)],
    }


@torch.no_grad()
def load_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Continue from what `optimizer_state` gave for the same model and layout."""
    distributed = _distributed(optimizer)
    if not distributed:
        optimizer.load_state_dict(state)
        return
    for part, saved in zip(distributed, state["adam"], strict=True):
        part.optimizer.load_state_dict(saved)
    shards = _master_shards(distributed)
    for shard, saved in zip(shards, state["master_weights"], strict=True):
        shard.copy_(saved)


def use_fused_adam(optimizer: Any) -> None:
    """Have torch's AdamW behind a Megatron optimizer make one pass over its memory, on a GPU."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            group["fused"] = True


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that it chains, or itself."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _distributed(optimizer: Any) -> list[DistributedOptimizer]:
    """The distributed optimizers that it chains; none if it is of another kind."""
    return [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]


def _master_shards(parts: Sequence[DistributedOptimizer]) -> list[torch.Tensor]:
    """fp32 copies of this rank's part of bf16 parameters."""
    return [p for part in parts for group in part.shard_fp32_from_float16_groups for p in group]
