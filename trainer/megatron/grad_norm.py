"""Clipping by a gradient norm that does not depend on who holds which part of the gradients.

The sum of squares is exact: a sum of integers, which no order and no cut moves.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.trainer.megatron.optimizer_state import optimizers_in
from samebit.weight_sync.objects import gather_objects

_SLICE = 1 << 24
"""Elements of which the squares are there at a time."""
_BITS = 36
"""Of each of the two digits that a square has; the sum of a slice's digits fits int64."""


@torch.no_grad()
def exact_norm(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> float:
    """The norm of the fp32 numbers of all ranks' tensors together, the same on all of them.

    Squares are exact in fp64. With the largest number m < 2^e they are taken as multiples of
    2^(2e - 72), the rest cut off, and added as integers; the square root of the sum is rounded to
    fp64. A NaN or an infinite number anywhere is the result.
    """
    parts = [x.view(-1) for x in tensors if x.numel()]
    largest = _largest(gather_objects(_largest_of(parts), group))
    if largest == 0 or not math.isfinite(largest):
        return largest
    exponent = math.frexp(largest)[1]
    digits = [
        torch.stack(_digit_sums(part.double() * 2.0**-exponent))
        for whole in parts
        for part in whole.split(_SLICE)
    ]
    own = 0
    if digits:
        high, low = zip(*torch.stack(digits).tolist(), strict=True)
        own = (sum(high) << _BITS) + sum(low)
    return math.sqrt(sum(gather_objects(own, group))) * 2.0 ** (exponent - _BITS)


def clip_gradients(optimizer: Any, exactly: bool = False) -> float:
    """Scale the gradients of a Megatron optimizer down to its clip_grad; their norm before.

    exactly: by exact_norm, else by Megatron's. Of a parameter that several ranks hold whole either
    counts one.
    """
    clip = optimizer.config.clip_grad
    parts = optimizers_in(optimizer)
    if not exactly:
        [only] = parts  # a chain does not know its groups
        return only.clip_grad_norm(clip) if clip > 0 else only.get_grad_norm()
    counted = [grad for part in parts for grad in part.get_grads_for_grad_norm()]
    norm = exact_norm(counted, parts[0].get_grad_stats_parallel_group())
    if 0 < clip < norm + 1e-6:  # as Megatron clips
        grads = [p.grad for part in parts for p in part.get_parameters() if p.grad is not None]
        if grads:  # a share may be padding alone
            torch._foreach_mul_(grads, clip / (norm + 1e-6))
    return norm


def _largest_of(parts: Sequence[Tensor]) -> float:
    bounds = [bound for part in parts for bound in part.aminmax()]
    return float(torch.stack(bounds).abs().max()) if bounds else 0.0


def _largest(values: Iterable[float]) -> float:
    """Of several numbers; NaN if one is."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def _digit_sums(x: Tensor) -> list[Tensor]:
    """Sums of the two digits to the base 2^36 behind the point of squares of x [n] fp64 in (-1, 1):
    int64 each."""
    scaled = x.square_().mul_(2.0**_BITS)
    high = scaled.floor()
    low = scaled.sub_(high).mul_(2.0**_BITS)
    return [digit.to(torch.int64).sum() for digit in (high, low)]
