"""reduce: sums over tensor-parallel ranks in ascending rank order, with one rounding.

Contract: docs/contract.md. The order is written out, because a collective's own order may change
with its algorithm. Under tp_invariant all sums are one binary tree over 8 segments of K: its lower
branches inside a rank, the upper ones between ranks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.kernels.contract import TP_SEGMENTS, tree_sum
from samebit.kernels.linear import linear, linear_in_segments

if TYPE_CHECKING:
    from samebit.kernels.gpu.peers import Peers


@dataclass(frozen=True)
class RankGroup:
    """This process among those that share every layer of a model; alone by default.

    Raises ValueError unless 0 <= rank < size and there is a group for more than one, and for a size
    that tp_invariant does not know.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    invariant: bool = False
    """numerics.tp_invariant: bits do not depend on the size."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"tensor rank {self.rank} is not in [0, {self.size})")
        if (self.size > 1) != (self.group is not None):
            raise ValueError(f"tensor size {self.size} with group {self.group}")
        if self.invariant and TP_SEGMENTS % self.size:
            raise ValueError(
                f"tensor size is {self.size}; with tp_invariant it must divide {TP_SEGMENTS}"
            )

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, size): which part of a tensor that is split over the ranks is here."""
        return self.rank, self.size

    @property
    def sums(self) -> bool:
        """Whether row-parallel products are sums of partial ones."""
        return self.size > 1 or self.invariant


ALONE = RankGroup()


def reduce_ref(partials: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum partials (equal shapes, fp32) from rank 0 upwards and round once to dtype."""
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    return total.to(dtype)


def sum_over_ranks(partial: Tensor, ranks: RankGroup, dtype: torch.dtype) -> Tensor:
    """Sum each rank's `partial` in fp32 and round once to dtype; every rank gets the same bits."""
    if ranks.size == 1:
        return partial.to(dtype)
    if peers := peers_of(ranks, partial.device):
        return peers.sum(partial, dtype, ranks.invariant)
    parts = _gather(partial, ranks.group)
    if ranks.invariant:
        return tree_sum([part.float() for part in parts]).to(dtype)
    return reduce_ref(parts, dtype)


def sum_of_own_rows(partial: Tensor, ranks: RankGroup, dtype: torch.dtype) -> Tensor:
    """This rank's rows of sum_over_ranks: [T, ...] -> [T / size, ...]; T is a multiple of size."""
    if peers := peers_of(ranks, partial.device):
        return peers.sum_of_own_rows(partial, dtype, ranks.invariant)
    return own_rows(sum_over_ranks(partial, ranks, dtype), ranks)


def gather_columns(x: Tensor, ranks: RankGroup) -> Tensor:
    """Every rank's columns [T, C] fp32, side by side in rank order: [T, size * C]."""
    if ranks.size == 1:
        return x
    if peers := peers_of(ranks, x.device):
        return peers.gather_columns(x)
    return torch.cat(_gather(x, ranks.group), dim=1)


def partial_linear(
    x: Tensor, weight: Tensor, ranks: RankGroup, main_grad: Tensor | None = None
) -> Tensor:
    """This rank's summand of a row-parallel product: [..., K / size] -> [..., N] fp32.

    It is differentiable in both; main_grad: see `linear`.
    """
    if ranks.invariant:
        return linear_in_segments(x, weight, TP_SEGMENTS // ranks.size, main_grad)
    return linear(x, weight, torch.float32, main_grad)


def row_parallel_linear(x: Tensor, weight: Tensor, ranks: RankGroup) -> Tensor:
    """x [M, K / size] times this rank's columns of a weight [N, K], summed over the ranks: [M, N].

    It is for inference: nothing is differentiated.
    """
    if not ranks.sums:
        return linear(x, weight)
    return sum_over_ranks(partial_linear(x, weight, ranks), ranks, x.dtype)


def vocab_parallel_embedding(token_ids: Tensor, weight: Tensor, ranks: RankGroup) -> Tensor:
    """Rows of an embedding whose rows are split over the ranks. token_ids [T] -> [T, D]."""
    if ranks.size == 1:
        return weight[token_ids]
    local = token_ids - ranks.rank * len(weight)
    elsewhere = (local < 0) | (local >= len(weight))
    rows = weight[local.masked_fill(elsewhere, 0)].float()
    return sum_over_ranks(rows.masked_fill_(elsewhere[:, None], 0.0), ranks, weight.dtype)


def gather_rows(x: Tensor, ranks: RankGroup) -> Tensor:
    """Every rank's rows [T, ...], one rank's behind another's: [size * T, ...]."""
    return torch.cat(_gather(x, ranks.group))


def own_rows(x: Tensor, ranks: RankGroup) -> Tensor:
    """This rank's part of rows that gather_rows would put together."""
    return x.chunk(ranks.size)[ranks.rank]


def peers_of(ranks: RankGroup, device: torch.device) -> "Peers | None":
    """GPUs that can read each other's memory, whose sums CUDA graphs may hold; else, for the same
    bits, parts are gathered by torch.distributed. All ranks ask together."""
    if device.type != "cuda" or ranks.group is None:
        return None
    from samebit.kernels.gpu import peers

    return peers.peers_of(ranks.group, device)


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts
