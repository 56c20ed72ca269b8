"""weights_digest: one 64-bit value for a set of weights, whatever their layout.

Every element adds mix(key(tensor) + position * step, bits) modulo 2^64, where position is the
element's place in its unpadded Hugging Face tensor. A sum commutes, so shards, interleaved rows and
any order give the same digest; padding is left out. `mix` is the finalizer of splitmix64 (Steele et
al. 2014, "Fast splittable pseudorandom number generators").
"""

import hashlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.weight_sync.mapping import ParamSpec
from samebit.weight_sync.objects import gather_objects

_STEP = 0x9E3779B97F4A7C15
_BITS = 0xD6E8FEB86659FD93
_CHUNK = 1 << 16  # elements at a time: the temporaries stay in the CPU's cache
_INT_OF_SIZE = {2: torch.int16, 4: torch.int32}


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _tensor_key(name: str, dtype: torch.dtype) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name}:{dtype}".encode(), digest_size=8).digest())


def _add_hash(
    total: Tensor, rows: Tensor, key: int, first_row: int, width: int, first_column: int
) -> None:
    """Add rows [R, C] that stand at (first_row, first_column) of a tensor `width` wide to total."""
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    bits = rows.view(_INT_OF_SIZE[rows.element_size()])
    key, step_factor, bits_factor = _signed(key), _signed(_STEP), _signed(_BITS)
    if rows.device.type == "cuda":
        from samebit.weight_sync.digest_gpu import add_hash

        return add_hash(bits, total, key, step_factor, bits_factor, first_row, width, first_column)
    bits_mask = (1 << (8 * rows.element_size())) - 1
    columns = rows.shape[1]
    column = torch.arange(first_column, first_column + columns)
    step = max(1, _CHUNK // columns)
    for part_start in range(0, rows.shape[0], step):
        part = bits[part_start : part_start + step].to(torch.int64) & bits_mask
        row = torch.arange(part_start, part_start + len(part)) + first_row
        position = row[:, None] * width + column
        total += _mix((position * step_factor + key) ^ (part * bits_factor)).sum()
    return None


def digest_sum(specs: Iterable[ParamSpec], params: Mapping[str, Tensor]) -> int:
    """This rank's summand of the digest; add the ranks' values modulo 2^64."""
    totals: dict[torch.device, Tensor] = {}
    for spec in specs:
        if spec.replica:
            continue
        param = params[spec.name]
        flat = param.detach().view(param.shape[0], -1)
        total = totals.setdefault(
            param.device, torch.zeros((), dtype=torch.int64, device=param.device)
        )
        for block in spec.blocks:
            shape = spec.hf_shapes[block.hf_name]
            width = shape[1] if len(shape) > 1 else 1
            rows = flat[block.start : block.start + block.num_rows]
            key = _tensor_key(block.hf_name, param.dtype)
            _add_hash(total, rows, key, block.hf_start, width, spec.column_start)
    return sum(int(total) for total in totals.values()) % (1 << 64)


def weights_digest(
    specs: Iterable[ParamSpec], params: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> str:
    """The digest of whole parameters as 16 hexadecimal digits.

    group: the ranks over which they are split; every rank gets the same.
    """
    total = digest_sum(specs, params)
    if group is not None:
        total = sum(gather_objects(total, group)) % (1 << 64)
    return f"{total:016x}"
