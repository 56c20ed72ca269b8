"""Names and shards: how a parameter of Megatron and the engine is cut from Hugging Face tensors.

Engine and trainer hold the same tensors under the same (Megatron's) names. Each is described as
rows taken from Hugging Face tensors, so one small algebra covers renaming, q/k/v interleaving,
gate/up stacking, vocabulary padding and tensor parallel shards, for loading, export and digests.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from samebit.weight_sync.types import ParamMeta

type Index = tuple[slice, ...]
"""A range of a tensor's rows and, of a matrix, one of its columns."""

type Read = Callable[[str, Index], Tensor]
"""Gives a part of a Hugging Face tensor, by the tensor's name."""


@dataclass(frozen=True)
class RowBlock:
    """`num_rows` rows of a parameter from `start` are rows of `hf_name` from `hf_start`."""

    start: int
    hf_name: str
    hf_start: int
    num_rows: int


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of one tensor parallel rank.

    Rows that no block covers are padding (zero). `column_start` is the first column of a shard that
    splits the columns, 0 otherwise. `hf_shapes` gives the full shape of each source tensor. A
    `replica` is held whole by rank 0 too, so it does not count again in the digest.
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[RowBlock, ...]
    hf_shapes: Mapping[str, tuple[int, ...]]
    column_start: int = 0
    replica: bool = False

    @property
    def num_rows(self) -> int:
        """Rows that blocks cover; padding stands behind them."""
        return sum(block.num_rows for block in self.blocks)

    def columns(self) -> slice:
        """The source columns that this shard of a matrix holds."""
        return slice(self.column_start, self.column_start + self.shape[1])

    def sources(self) -> dict[str, Index]:
        """What the blocks take of each Hugging Face tensor, from their first to their last row."""
        rows: dict[str, tuple[int, int]] = {}
        for block in self.blocks:
            start, end = rows.get(block.hf_name, (block.hf_start, 0))
            last = block.hf_start + block.num_rows
            rows[block.hf_name] = min(start, block.hf_start), max(end, last)
        columns = (self.columns(),) if len(self.shape) > 1 else ()
        return {name: (slice(*found), *columns) for name, found in rows.items()}


type Shard = tuple[int, int]
"""(rank, size): which of the equal parts of every split tensor; kernels.reduce.RankGroup has it."""

WHOLE: Shard = (0, 1)


def _split(name: str, total: int, shard: Shard) -> tuple[int, int]:
    """(start, length) of a shard's part; ValueError if `total` does not divide."""
    rank, size = shard
    if total % size:
        raise ValueError(f"{name} = {total} does not divide by tensor parallel size {size}")
    return total // size * rank, total // size


def plain(name: str, hf_name: str, shape: tuple[int, ...], shard: Shard = WHOLE) -> ParamSpec:
    """A parameter that every rank holds whole."""
    block = RowBlock(0, hf_name, 0, shape[0])
    return ParamSpec(name, shape, (block,), {hf_name: shape}, replica=shard[0] > 0)


def columns(name: str, hf_name: str, shape: tuple[int, int], shard: Shard = WHOLE) -> ParamSpec:
    """A row-parallel weight: its input columns are split over the ranks."""
    start, width = _split(f"{name} columns", shape[1], shard)
    block = RowBlock(0, hf_name, 0, shape[0])
    return ParamSpec(name, (shape[0], width), (block,), {hf_name: shape}, start)


def vocab(
    name: str, hf_name: str, shape: tuple[int, int], padded: int, shard: Shard = WHOLE
) -> ParamSpec:
    """An embedding or output weight: rows padded to `padded`, then split over the ranks."""
    start, rows = _split(f"{name} rows", padded, shard)
    live = max(0, min(rows, shape[0] - start))
    blocks = (RowBlock(0, hf_name, start, live),) if live else ()
    return ParamSpec(name, (rows, shape[1]), blocks, {hf_name: shape})


def stacked(
    name: str, hf_names: Iterable[str], shape: tuple[int, int], shard: Shard = WHOLE
) -> ParamSpec:
    """Equal weights stacked by rank: [gate; up] of each rank's rows."""
    names = tuple(hf_names)
    start, rows = _split(f"{name} rows", shape[0], shard)
    blocks = tuple(RowBlock(i * rows, n, start, rows) for i, n in enumerate(names))
    return ParamSpec(name, (rows * len(names), shape[1]), blocks, dict.fromkeys(names, shape))


def grouped_qkv(
    name: str,
    hf_names: tuple[str, str, str],
    heads: tuple[int, int, int],
    width: int | None,
    shard: Shard = WHOLE,
) -> ParamSpec:
    """q, k and v interleaved by kv group: each group's query heads, its key head, its value head.

    heads = (query heads Hq, kv heads Hkv, head dim Dh). width: columns of the weights; None for
    their biases, which have as many elements as the weights have rows.
    """
    num_heads, num_kv, head_dim = heads
    group_rows = num_heads // num_kv * head_dim
    first, num_groups = _split(f"{name} kv heads", num_kv, shard)
    q, k, v = hf_names
    blocks = []
    for i in range(num_groups):
        start, group = i * (group_rows + 2 * head_dim), first + i
        blocks.append(RowBlock(start, q, group * group_rows, group_rows))
        blocks.append(RowBlock(start + group_rows, k, group * head_dim, head_dim))
        blocks.append(RowBlock(start + group_rows + head_dim, v, group * head_dim, head_dim))
    tail = () if width is None else (width,)
    kv_shape = (num_kv * head_dim, *tail)
    shapes = {q: (num_heads * head_dim, *tail), k: kv_shape, v: kv_shape}
    rows = num_groups * (group_rows + 2 * head_dim)
    return ParamSpec(name, (rows, *tail), tuple(blocks), shapes)


def hf_shapes(specs: Iterable[ParamSpec]) -> dict[str, tuple[int, ...]]:
    """The full shape of every Hugging Face tensor that the specs draw on."""
    return {name: shape for spec in specs for name, shape in spec.hf_shapes.items()}


def regions_of(
    specs: Iterable[ParamSpec], hf_name: str, dtype: torch.dtype
) -> list[tuple[ParamMeta, tuple[slice, ...]]]:
    """Where a Hugging Face tensor lies in the specs' parameters: regions, and its part for each."""
    found: list[tuple[ParamMeta, tuple[slice, ...]]] = []
    for spec in specs:
        for block in spec.blocks:
            if block.hf_name != hf_name:
                continue
            rows = slice(block.hf_start, block.hf_start + block.num_rows)
            shape = (block.num_rows, *spec.shape[1:])
            start = (block.start, *(0 for _ in spec.shape[1:]))
            meta = ParamMeta(spec.name, shape, str(dtype), 0, start)
            found.append((meta, (rows, spec.columns()) if len(shape) > 1 else (rows,)))
    return found


def unequal_shapes(
    specs: Iterable[ParamSpec], params: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]]:
    """(shape, shape by the specs) of the parameters where these differ; None: there is none."""
    found = {name: tuple(param.shape) for name, param in params.items()}
    wanted = {spec.name: spec.shape for spec in specs}
    both = {name: (found.get(name), wanted.get(name)) for name in {**wanted, **found}}
    return {name: (there, here) for name, (there, here) in both.items() if there != here}


def load_params(specs: Iterable[ParamSpec], params: Mapping[str, Tensor], read: Read) -> None:
    """Fill `params` in place; of each Hugging Face tensor only what they hold is read."""
    for spec in specs:
        param, sources = params[spec.name], spec.sources()
        param.zero_()
        found = {name: read(name, index) for name, index in sources.items()}
        for block in spec.blocks:
            start = block.hf_start - sources[block.hf_name][0].start
            rows = found[block.hf_name][start : start + block.num_rows]
            # Pinned rows need not be waited for: their memory is kept until they have arrived.
            param[block.start : block.start + block.num_rows].copy_(rows, non_blocking=True)


def parts_of(read: Callable[[str], Tensor]) -> Read:
    """A reader of parts from one of whole tensors."""
    return lambda name, index: read(name)[index]


def hf_parts(specs: Iterable[ParamSpec]) -> list[tuple[str, Index]]:
    """What load_params reads, in the order in which it first does."""
    return list(dict.fromkeys(part for spec in specs for part in spec.sources().items()))


def hf_tensors(
    specs: Iterable[ParamSpec], params: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Unsharded Hugging Face tensors from the parameters of one whole rank (size 1)."""
    for spec in specs:
        whole: dict[str, Tensor] = {}
        collect_hf([spec], params, whole)
        yield from whole.items()


def collect_hf(
    specs: Iterable[ParamSpec], params: Mapping[str, Tensor], into: dict[str, Tensor]
) -> None:
    """Write one rank's parts of Hugging Face tensors into the whole ones, made when first met."""
    for spec in specs:
        param = params[spec.name]
        for block in spec.blocks:
            if block.hf_name not in into:
                into[block.hf_name] = param.new_empty(spec.hf_shapes[block.hf_name])
            rows = into[block.hf_name][block.hf_start : block.hf_start + block.num_rows]
            own = param[block.start : block.start + block.num_rows]
            (rows[:, spec.columns()] if rows.dim() > 1 else rows).copy_(own)
