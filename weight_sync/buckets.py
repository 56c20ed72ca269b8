"""Which tensors travel together: parameters in order, cut into buckets of a bounded size.

A tensor that is alone in its bucket and contiguous need not be copied: the bucket is over its own
memory, at the sender as at the receiver.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from samebit.weight_sync.types import Bucket, ParamMeta, WeightSyncError

ALIGN = 64  # bytes; every dtype's views stay aligned
ALONE = 1 << 20  # bytes of a tensor whose copies cost more than a transfer of its own


def aligned(num_bytes: int) -> int:
    """The room of so many bytes in a buffer: what follows begins behind it."""
    return -(-num_bytes // ALIGN) * ALIGN


def cut_buckets(params: Mapping[str, Tensor], bucket_bytes: int) -> list[tuple[ParamMeta, ...]]:
    """Cut params, in their own order, into buckets of at most bucket_bytes (or one tensor).

    A tensor of 1 MiB or more has a bucket of its own. Raises ValueError for a limit below 1.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be positive, got {bucket_bytes}")
    buckets: list[list[ParamMeta]] = []
    end = 0
    for name, tensor in params.items():
        num_bytes = tensor.numel() * tensor.element_size()
        room = num_bytes if num_bytes < ALONE else max(num_bytes, bucket_bytes)
        if not buckets or end + room > bucket_bytes:
            buckets.append([])
            end = 0
        buckets[-1].append(ParamMeta(name, tuple(tensor.shape), str(tensor.dtype), end))
        end += aligned(room)
    return [tuple(metas) for metas in buckets]


def empty_bucket(metas: Sequence[ParamMeta], device: torch.device) -> Bucket:
    """Make a bucket whose buffer is still to be filled."""
    num_bytes = metas[-1].offset + metas[-1].num_bytes
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return Bucket(tuple(metas), buffer)


def bucket_over(metas: Sequence[ParamMeta], tensors: Sequence[Tensor]) -> Bucket:
    """Make a bucket over the memory of the one tensor, if it is contiguous, else an empty one.

    `tensors` are those that `metas` name, of the same shapes.
    """
    first = tensors[0]
    if len(tensors) == 1 and metas[0].offset == 0 and first.is_contiguous():
        return Bucket(tuple(metas), first.detach().view(-1).view(torch.uint8))
    return empty_bucket(metas, first.device)


def pack(metas: Sequence[ParamMeta], params: Mapping[str, Tensor]) -> Bucket:
    """Put the named tensors into a bucket on their device; one that is alone is not copied.

    Raises WeightSyncError for one that is not as `metas` say.
    """
    tensors = [params[meta.name].detach() for meta in metas]
    for meta, tensor in zip(metas, tensors, strict=True):
        if (tuple(tensor.shape), str(tensor.dtype)) != (meta.shape, meta.dtype):
            raise WeightSyncError(
                f"{meta.name} is {tuple(tensor.shape)} {tensor.dtype} here and "
                f"{meta.shape} {meta.dtype} at the receiver"
            )
    bucket = bucket_over(metas, tensors)
    for meta, tensor in zip(metas, tensors, strict=True):
        copy_apart(tensor, bucket.tensor(meta))
    return bucket


def flat_metas(
    names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
) -> list[ParamMeta]:
    """What tensors are that lie one right behind another in a flat buffer.

    dtypes: as torch prints them, "torch." or not.
    """
    metas, end = list[ParamMeta](), 0
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        metas.append(ParamMeta(name, tuple(shape), dtype, end))
        end += metas[-1].num_bytes
    return metas


def cut_flat(flat: Tensor, metas: Sequence[ParamMeta]) -> list[Tensor]:
    """The tensors of flat_metas in a flat uint8 buffer: views, or copies where bytes are not
    aligned."""
    parts = [flat[meta.offset : meta.offset + meta.num_bytes] for meta in metas]
    return [
        view_as(part, meta.torch_dtype).view(meta.shape)
        for part, meta in zip(parts, metas, strict=True)
    ]


def view_as(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """A flat tensor's bytes as those of another dtype; a copy if they do not lie aligned."""
    contiguous = flat.contiguous().view(torch.uint8)
    is_aligned = contiguous.storage_offset() % dtype.itemsize == 0
    return (contiguous if is_aligned else contiguous.clone()).view(dtype)


def copy_apart(source: Tensor, target: Tensor) -> None:
    """Copy a tensor to another of its shape and dtype, unless both are the same memory."""
    if source.data_ptr() == target.data_ptr() and source.stride() == target.stride():
        return
    memory = (x.untyped_storage().data_ptr() for x in (source, target))
    target.copy_(source.clone() if len(set(memory)) == 1 else source)
