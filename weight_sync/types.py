"""What crosses from trainer to engine: versions, parameter metadata and buckets."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, order=True)
class WeightVersion:
    """One exact set of weights: the optimizer step that made it and its digest.

    Example: WeightVersion(step=12, digest="9f86d081884c7d65")
    """

    step: int
    digest: str


@dataclass(frozen=True)
class VersionSpan:
    """Tokens of a completion from `start` (index into its token_ids) were drawn by `version`."""

    start: int
    version: WeightVersion


@dataclass(frozen=True)
class ParamMeta:
    """Where one tensor lies in a bucket. `offset` in bytes; `dtype` as torch prints it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype object that `dtype` names."""
        return getattr(torch, self.dtype.removeprefix("torch."))


@dataclass(frozen=True)
class Bucket:
    """Some tensors in one flat uint8 buffer, moved by one transfer."""

    metas: tuple[ParamMeta, ...]
    buffer: torch.Tensor

    def tensor(self, meta: ParamMeta) -> torch.Tensor:
        """A view of one tensor in the buffer."""
        dtype = meta.torch_dtype
        num_bytes = dtype.itemsize * torch.Size(meta.shape).numel()
        return self.buffer[meta.offset : meta.offset + num_bytes].view(dtype).view(meta.shape)


class WeightSyncError(RuntimeError):
    """An update broke off or arrived damaged; the message says what happened."""
