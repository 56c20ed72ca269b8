"""What crosses from trainer to engine: versions, parameter metadata and buckets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samebit.weight_sync.failures import CrashError


@dataclass(frozen=True, order=True)
class WeightVersion:
    """One exact set of weights: the optimizer step that made it and its digest.

    Example: WeightVersion(step=12, digest="9f86d081884c7d65")
    """

    step: int
    digest: str


@dataclass(frozen=True)
class VersionSpan:
    """Tokens of a completion from `start` (index into its token_ids) were drawn by `version`.

    recomputed: the keys and values of what stands before `start` are by `version` as well; else
    they stayed those of the spans before.
    """

    start: int
    version: WeightVersion
    recomputed: bool = False


@dataclass(frozen=True)
class ParamMeta:
    """Names a parameter, or a region of one, and says where it lies in a bucket.

    `shape` is the region's; `start` is the index of its first element in the receiver's parameter,
    None if the region is the whole of it. `offset` in bytes; `dtype` as torch prints it.

    Example: rows 8 to 11 of a matrix with 6 columns are ParamMeta(name, (4, 6), dtype, 0, (8, 0))
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    start: tuple[int, ...] | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype.removeprefix("torch."))

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()

    def num_elements_in(self, num_rows: int) -> int:
        """Elements of the region that lie in the first rows of the parameter."""
        first, length = self._first[0], self.shape[0]
        rows = max(0, min(length, num_rows - first))
        return self.num_elements // length * rows if length else 0

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.torch_dtype.itemsize

    @property
    def _first(self) -> tuple[int, ...]:
        return (0,) * len(self.shape) if self.start is None else self.start

    def view_in(self, buffer: Tensor) -> Tensor:
        """A view of the region in a flat uint8 buffer, at its offset."""
        part = buffer[self.offset : self.offset + self.num_bytes]
        return part.view(self.torch_dtype).view(self.shape)

    def region_of(self, param: Tensor) -> Tensor | None:
        """A view of the region in `param`; None if it is not one of this tensor."""
        region, start = param, self.start
        if start is not None:
            if len(start) != param.dim() or min(start, default=0) < 0:
                return None
            sides = zip(start, self.shape, strict=False)
            region = param[tuple(slice(first, first + length) for first, length in sides)]
        fits = (tuple(region.shape), str(region.dtype)) == (self.shape, self.dtype)
        return region if fits else None

    def overlaps(self, other: "ParamMeta") -> bool:
        """Whether two regions of one parameter have an element in common."""
        sides = zip(self._first, self.shape, other._first, other.shape, strict=True)
        return all(a < b + n and b < a + m for a, m, b, n in sides)


@dataclass(frozen=True)
class Bucket:
    """Some tensors in one flat uint8 buffer, moved by one transfer."""

    metas: tuple[ParamMeta, ...]
    buffer: Tensor

    def tensor(self, meta: ParamMeta) -> Tensor:
        """A view of one tensor in the buffer."""
        return meta.view_in(self.buffer)


class WeightSyncError(RuntimeError):
    """An update broke off or arrived damaged; the message says what happened."""


class LostMemberError(WeightSyncError, CrashError):
    """A member of a weight group is dead or silent: the group is of no use any more."""
