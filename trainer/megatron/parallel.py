"""Tensor and sequence parallel communication, differentiable, with sums in rank order.

Sequence parallel: between the linears each rank holds its own part of the tokens [T / size, ...].
Source: Korthikanti et al. 2022, arXiv 2205.05198.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.kernels.linear import linear
from samebit.kernels.reduce import (
    RankGroup,
    gather_rows,
    own_rows,
    partial_linear,
    sum_of_own_rows,
    sum_over_ranks,
)
from samebit.trainer.context import ContextShare
from samebit.trainer.megatron.main_grad import main_grad_of


def ranks_of(group: dist.ProcessGroup, invariant: bool = False) -> RankGroup:
    """This process in a tensor parallel group."""
    size = dist.get_world_size(group)
    return RankGroup(dist.get_rank(group), size, group if size > 1 else None, invariant)


class _Spread(torch.autograd.Function):
    """Whole rows to every rank's part of a layer; backward: the sum of the parts' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: RankGroup, sequence: bool) -> Tensor:
        ctx.ranks, ctx.sequence = ranks, sequence
        return gather_rows(x, ranks) if sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sum_up = sum_of_own_rows if ctx.sequence else sum_over_ranks
        return sum_up(grad, ctx.ranks, grad.dtype), None, None


class _Collect(torch.autograd.Function):
    """The sum of every rank's partial result, rounded once; backward: its gradient to all."""

    @staticmethod
    def forward(
        ctx: Any, partial: Tensor, ranks: RankGroup, sequence: bool, dtype: torch.dtype
    ) -> Tensor:
        ctx.ranks, ctx.sequence = ranks, sequence
        return (sum_of_own_rows if sequence else sum_over_ranks)(partial, ranks, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        whole = gather_rows(grad, ctx.ranks) if ctx.sequence else grad
        return whole, None, None, None


class _GatherContext(torch.autograd.Function):
    """Every rank's keys or values in the packed order; backward: the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: ContextShare) -> Tensor:
        ctx.share, ctx.num_own = share, len(x)
        padded = x.new_zeros(share.num_padded, *x.shape[1:])
        padded[: len(x)] = x
        return gather_rows(padded, share.ranks)[share.order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        share = ctx.share
        total = sum_over_ranks(grad, share.ranks, grad.dtype)
        padded = total.new_zeros(share.num_padded * share.ranks.size, *total.shape[1:])
        padded[share.order] = total
        return own_rows(padded, share.ranks)[: ctx.num_own], None


def gather_context(x: Tensor, share: ContextShare | None) -> Tensor:
    """This rank's and all other keys or values [T, Hkv, Dh], in the packed batch's order."""
    return x if share is None else _GatherContext.apply(x, share)


def gather_loss_rows(values: Tensor, share: ContextShare, num_rows: int) -> Tensor:
    """Every rank's loss rows in the whole batch's order [num_rows]; nothing is differentiated."""
    whole = values.new_zeros(num_rows)
    whole[share.rows] = values
    return sum_over_ranks(whole, share.ranks, whole.dtype)


def spread(x: Tensor, ranks: RankGroup, sequence: bool) -> Tensor:
    """What a column-parallel product multiplies: x [T, ...], or [T / size, ...] if `sequence`."""
    return x if ranks.size == 1 else _Spread.apply(x, ranks, sequence)


def row_parallel(x: Tensor, weight: Tensor, ranks: RankGroup, sequence: bool) -> Tensor:
    """x [T, b, K / size] times this rank's weight [N, K / size], summed: [T or T / size, b, N]."""
    main_grad = main_grad_of(weight)
    if not ranks.sums:
        return linear(x, weight, main_grad=main_grad)
    partial = partial_linear(x, weight, ranks, main_grad)
    return _Collect.apply(partial, ranks, sequence, x.dtype)
