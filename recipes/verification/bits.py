"""How far apart two tensors are, to the bit."""

from dataclasses import dataclass

import torch
from torch import Tensor

_INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements at a time, so that temporaries stay small beside a model's largest


@dataclass(frozen=True)
class Distance:
    """Says where and how far two tensors differ. Ulps count the values between two floats."""

    num_differing: int
    index: tuple[int, ...]
    """Of the first differing element."""
    ulps: int
    """Of the first; of integers, their difference."""
    max_ulps: int


def distance(a: Tensor, b: Tensor) -> Distance | None:
    """Return how far two tensors of one dtype and shape are apart; None if all bits are equal.

    Stricter than torch.equal: -0.0 is not 0.0 (0 ulps apart), and a NaN equals the same NaN.
    """
    flat = a.detach().reshape(-1), b.detach().reshape(-1)
    first, num_differing, max_ulps = None, 0, 0
    for start in range(0, a.numel(), _CHUNK):
        x, y = (_bits(part[start : start + _CHUNK]) for part in flat)
        where = (x != y).nonzero().flatten()
        if not len(where):
            continue
        if a.is_floating_point():
            x, y = _ordered(x[where]), _ordered(y[where])
        else:
            x, y = x[where].long(), y[where].long()
        if first is None:
            first = start + int(where[0]), abs(int(x[0]) - int(y[0]))
        num_differing += len(where)
        max_ulps = max(max_ulps, _largest(x, y, a.element_size()))
    if first is None:
        return None
    place = torch.unravel_index(torch.tensor(first[0]), a.shape) if a.dim() else ()
    return Distance(num_differing, tuple(int(i) for i in place), first[1], max_ulps)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_INT_OF_SIZE[x.element_size()]) if x.is_floating_point() else x


def _ordered(bits: Tensor) -> Tensor:
    """Floats in ascending order as ascending integers; both zeros are 0."""
    magnitude = bits.long() & torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, -magnitude, magnitude)


def _largest(x: Tensor, y: Tensor, element_size: int) -> int:
    if element_size < 8:
        return int((x - y).abs().max())
    return max(abs(p - q) for p, q in zip(x.tolist(), y.tolist(), strict=True))  # exact past int64
