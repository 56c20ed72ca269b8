"""weights_digest on the GPU: one pass over the weights, at the memory's speed."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from samebit.weight_sync.coefficients import Rectangle

_TILE_ROWS = 64
_BLOCK_ROWS = 8  # loads of each thread on their way at a time
_THREADS = 128
_LOAD_BYTES = 16  # of one thread
_LIMITS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_ROUNDED_LIMIT = 0x7F7F8000


@triton.jit(do_not_specialize=["first_tile"])
def _tile_kernel(
    tiles_ptr, rectangles_ptr, table_ptr, total_ptr, first_tile, SIZE: tl.constexpr,
    ROUND: tl.constexpr, LIMIT: tl.constexpr, ALIGN: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add one tile's elements to total[0]; to total[1], 1 if one of them is NaN or infinite.

    tiles [T, 3]: rectangle, first row, first column. rectangles [N, 6]: address, rows, columns, row
    stride in elements, first row's and first column's place in the table. All int64.
    SIZE: bytes of an element. ROUND: fp32 that counts as bf16. LIMIT: bits of infinity, or of what
    is rounded to it. ALIGN: columns and row strides are multiples of it, and addresses of so many
    elements.
    """
    tile = tiles_ptr + (first_tile + tl.program_id(0)) * 3
    rectangle = rectangles_ptr + tl.load(tile) * 6
    first_row, first_column = tl.load(tile + 1), tl.load(tile + 2)
    num_rows = tl.load(rectangle + 1) - first_row
    num_columns = (tl.load(rectangle + 2) - first_column) // ALIGN * ALIGN
    stride = tl.load(rectangle + 3)
    rows_ptr = table_ptr + tl.load(rectangle + 4) + first_row
    columns_ptr = table_ptr + tl.load(rectangle + 5) + first_column
    address = tl.load(rectangle) + (first_row * stride + first_column) * SIZE
    if SIZE == 2:
        values_ptr = address.to(tl.pointer_type(tl.uint16))
    else:
        values_ptr = address.to(tl.pointer_type(tl.uint32))
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = column < num_columns
    sums = tl.zeros([BLOCK_COLUMNS], tl.int64)
    peaks = tl.zeros([BLOCK_COLUMNS], tl.int32)
    for start in range(0, tl.minimum(num_rows, TILE_ROWS), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        live = row < num_rows
        places = values_ptr + row[:, None].to(tl.int64) * stride + column[None, :]
        places = tl.multiple_of(places, (1, ALIGN * SIZE))
        bits = tl.load(places, mask=live[:, None] & inside[None, :], other=0).to(tl.uint32)
        without_sign = bits & (0x7FFF if SIZE == 2 else 0x7FFFFFFF)
        peaks = tl.maximum(peaks, tl.max(without_sign.to(tl.int32), 0))
        if ROUND:
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        factor = tl.load(rows_ptr + row, mask=live, other=0)
        sums += tl.sum((bits.to(tl.int64) + 1) * factor[:, None], 0)
    # Integers modulo 2^64: any order of the sum gives the same.
    factor = tl.load(columns_ptr + column, mask=inside, other=0)
    tl.atomic_add(total_ptr, tl.sum(sums * factor, 0))
    tl.atomic_add(total_ptr + 1, 1, mask=tl.max(peaks, 0) >= LIMIT)


class TileTable:
    """Tiles of rectangles, by parts that may be summed one by one, on the device of `table`.

    The rectangles' memory must outlive this and stay where it is.
    """

    def __init__(self, parts: Sequence[Sequence[Rectangle]], table: Tensor) -> None:
        """table: the coefficients, int64. Raises ValueError for columns that lie apart."""
        self._table = table
        self._launches = []
        for kind in sorted({_kind(each) for part in parts for each in part}):
            rectangles: list[list[int]] = []
            tiles: list[Tensor] = [torch.empty(0, 3, dtype=torch.int64)]
            bounds = [0]
            for part in parts:
                bounds.append(bounds[-1])
                for each in part:
                    if _kind(each) == kind:
                        tiles.append(_tiles(each, len(rectangles)))
                        rectangles.append(_record(each))
                        bounds[-1] += len(tiles[-1])
            on_device = torch.tensor(rectangles).to(table.device)
            self._launches.append((kind, on_device, torch.cat(tiles).to(table.device), bounds))

    def add(self, total: Tensor, part: int | None = None) -> None:
        """Add the sum of one part, or of all, to total[0], int64; to total[1] how many of its tiles
        are not finite.
        """
        for (size, rounded, limit, align), rectangles, tiles, bounds in self._launches:
            first, end = (0, bounds[-1]) if part is None else bounds[part : part + 2]
            if first < end:
                _tile_kernel[(end - first,)](
                    tiles_ptr=tiles, rectangles_ptr=rectangles, table_ptr=self._table,
                    total_ptr=total, first_tile=first, SIZE=size, ROUND=rounded, LIMIT=limit,
                    ALIGN=align, TILE_ROWS=_TILE_ROWS, BLOCK_ROWS=_BLOCK_ROWS,
                    BLOCK_COLUMNS=_block_columns(size), num_warps=_THREADS // 32,
                )  # fmt: skip


def _block_columns(size: int) -> int:
    return _THREADS * _LOAD_BYTES // size


def _kind(each: Rectangle) -> tuple[int, bool, int, int]:
    """(bytes of an element, whether it is rounded, its bits from which on it counts as infinite or
    NaN, elements that a thread may load at once)."""
    values, size = each.values, each.values.element_size()
    rounded = (values.dtype, each.dtype) == (torch.float32, torch.bfloat16)
    if not rounded and (values.dtype != each.dtype or values.dtype not in _LIMITS):
        raise ValueError(f"{values.dtype} cannot be digested as {each.dtype} on a GPU")
    together = _LOAD_BYTES // size
    places = (values.data_ptr() // size, values.stride(0), values.shape[1])
    aligned = values.data_ptr() % size == 0 and all(place % together == 0 for place in places)
    limit = _ROUNDED_LIMIT if rounded else _LIMITS[values.dtype]
    return size, rounded, limit, together if aligned else 1


def _record(each: Rectangle) -> list[int]:
    values = each.values
    if values.stride(1) != 1 and values.shape[1] > 1:
        raise ValueError(
            f"a tensor of shape {tuple(values.shape)} and strides {values.stride()}: the digest "
            "on a GPU takes rows whose elements are neighbours"
        )
    return [values.data_ptr(), *values.shape, values.stride(0), each.row, each.column]


def _tiles(each: Rectangle, index: int) -> Tensor:
    """[T, 3]: rectangle, first row, first column."""
    rows, columns = each.values.shape
    return torch.cartesian_prod(
        torch.tensor([index]),
        torch.arange(0, rows, _TILE_ROWS),
        torch.arange(0, columns, _block_columns(each.values.element_size())),
    )
