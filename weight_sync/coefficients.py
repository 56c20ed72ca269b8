"""What every element of a set of weights is multiplied by in the digest, as one table.

The digest is bilinear: an element counts (bits + 1) x row coefficient x column coefficient. So a
table has one number for each row of each parameter, not for each element.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samebit.weight_sync.mapping import ParamSpec

_ROW_STEP = 0x9E3779B97F4A7C15
_COLUMN_STEP = 0xD6E8FEB86659FD93


@dataclass(frozen=True)
class Rectangle:
    """values [R, C], and where in the table the coefficients of its rows and columns begin.

    They count as numbers of `dtype`, to which they are rounded (to nearest, ties to even).
    """

    values: Tensor
    row: int
    column: int
    dtype: torch.dtype


class Coefficients:
    """The table for some parameters: the columns' coefficients, then the rows' of each parameter.

    table: int64, modulo 2^64, on the CPU. Rows of padding and of replicas have 0.
    """

    def __init__(self, specs: Sequence[ParamSpec], params: Mapping[str, Tensor]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._dtypes = {spec.name: params[spec.name].dtype for spec in specs}
        num_columns = max((_columns(spec).stop for spec in specs), default=0)
        column = torch.arange(1, num_columns + 1) * _signed(_COLUMN_STEP)
        self._starts, size = {}, num_columns
        for spec in specs:
            self._starts[spec.name] = size
            size += spec.shape[0]
        seeds = torch.zeros(size, dtype=torch.int64)
        live = torch.zeros(size, dtype=torch.bool)
        seeds[:num_columns], live[:num_columns] = column, True
        for spec in specs:
            for block in () if spec.replica else spec.blocks:
                here = slice(start := self._starts[spec.name] + block.start, start + block.num_rows)
                row = torch.arange(block.hf_start + 1, block.hf_start + block.num_rows + 1)
                key = _tensor_key(block.hf_name, self._dtypes[spec.name])
                seeds[here], live[here] = row * _signed(_ROW_STEP) + key, True
        self.table = (mix(seeds) | 1) * live

    def of_param(self, name: str, values: Tensor) -> list[Rectangle]:
        """A whole parameter, whose rows may lie apart."""
        if not values.numel():
            return []
        first, start, dtype = self._columns_of(name).start, self._starts[name], self._dtypes[name]
        if values.dim() == 1:  # one row of a matrix whose columns have the rows' coefficients
            return [Rectangle(values[None], 0, start, dtype)]
        return [Rectangle(values, start, first, dtype)]

    def of_part(self, name: str, start: int, values: Tensor) -> list[Rectangle]:
        """The elements of a flattened parameter from `start` on: the end of a row, whole rows, the
        beginning of one."""
        first, dtype = self._starts[name], self._dtypes[name]
        if len(self._specs[name].shape) == 1:
            return [Rectangle(values.view(1, -1), 0, first + start, dtype)] if len(values) else []
        columns = self._columns_of(name)
        width = columns.stop - columns.start
        row, column = divmod(start, width)
        head = min(len(values), -start % width)
        rows, tail = divmod(len(values) - head, width)
        ends = head, head + rows * width, len(values)
        below = first + row + bool(column)
        found = [
            Rectangle(values[: ends[0]].view(1, -1), first + row, columns.start + column, dtype),
            Rectangle(values[ends[0] : ends[1]].view(-1, width), below, columns.start, dtype),
            Rectangle(values[ends[1] :].view(1, -1), below + rows, columns.start, dtype),
        ]
        return [each for each in found if each.values.numel()]

    def _columns_of(self, name: str) -> slice:
        return _columns(self._specs[name])


def _columns(spec: ParamSpec) -> slice:
    return spec.columns() if len(spec.shape) > 1 else slice(0, 1)


def _tensor_key(name: str, dtype: torch.dtype) -> int:
    data = hashlib.blake2b(f"{name}:{dtype}".encode(), digest_size=8).digest()
    return int.from_bytes(data, signed=True)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), of int64 modulo 2^64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))
