"""Which tensors travel together: parameters in order, cut into buckets of a bounded size."""

from collections.abc import Mapping, Sequence

import torch

from samebit.weight_sync.types import Bucket, ParamMeta

_ALIGN = 64  # bytes; every dtype's views stay aligned


def plan_buckets(
    params: Mapping[str, torch.Tensor], bucket_bytes: int
) -> list[tuple[ParamMeta, ...]]:
    """Cut params, in their own order, into buckets of at most bucket_bytes (or one tensor)."""
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be positive, got {bucket_bytes}")
    buckets: list[list[ParamMeta]] = []
    end = 0
    for name, tensor in params.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if not buckets or end + num_bytes > bucket_bytes:
            buckets.append([])
            end = 0
        buckets[-1].append(ParamMeta(name, tuple(tensor.shape), str(tensor.dtype), end))
        end += -(-num_bytes // _ALIGN) * _ALIGN
    return [tuple(metas) for metas in buckets]


def empty_bucket(metas: Sequence[ParamMeta], device: torch.device) -> Bucket:
    """A bucket whose buffer is still to be filled."""
    last = metas[-1]
    num_bytes = last.offset + torch.Size(last.shape).numel() * last.torch_dtype.itemsize
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return Bucket(tuple(metas), buffer)


def pack(metas: Sequence[ParamMeta], params: Mapping[str, torch.Tensor]) -> Bucket:
    """Copy the named tensors into one flat buffer on their device."""
    bucket = empty_bucket(metas, params[metas[0].name].device)
    for meta in metas:
        bucket.tensor(meta).copy_(params[meta.name].detach())
    return bucket
