"""Which rank sends which part of which parameter to whom: made once, from what every rank holds.

All ranks make the same plan from the same holdings, so nothing but its digest is said before an
update. Both ends describe their parameters as rows and columns of Hugging Face tensors
(weight_sync.mapping); where two descriptions meet, a rectangle travels. So tensor parallel shards
of any sizes, stages and copies are one case, and a receiver gets what it holds, once. Padding,
which is in no Hugging Face tensor, does not travel.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from samebit.weight_sync.buckets import ALIGN, ALONE, aligned
from samebit.weight_sync.mapping import ParamSpec, RowBlock
from samebit.weight_sync.objects import encode
from samebit.weight_sync.types import ParamMeta, WeightSyncError


@dataclass(frozen=True)
class Holding:
    """What one rank holds: its parameters' specs and dtypes, as torch prints them."""

    specs: tuple[ParamSpec, ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, specs: Iterable[ParamSpec], params: Mapping[str, Tensor]) -> "Holding":
        """Raises WeightSyncError for a spec without its parameter."""
        specs = tuple(specs)
        if absent := [spec.name for spec in specs if spec.name not in params]:
            raise WeightSyncError(f"{len(absent)} tensors are missing: {', '.join(absent[:5])}")
        return cls(specs, tuple(str(params[spec.name].dtype) for spec in specs))

    def to_plain(self) -> list[Any]:
        """The holding as a plain value (weight_sync.objects)."""
        return [
            (
                *(spec.name, dtype, spec.shape, spec.column_start),
                [(b.start, b.hf_name, b.hf_start, b.num_rows) for b in spec.blocks],
                dict(spec.hf_shapes),
            )
            for spec, dtype in zip(self.specs, self.dtypes, strict=True)
        ]

    @classmethod
    def of_plain(cls, value: list[Any]) -> "Holding":
        """What `to_plain` was made of, but for which parameters are replicas."""
        specs = [
            ParamSpec(name, tuple(shape), tuple(RowBlock(*b) for b in blocks), shapes, column)
            for name, _, shape, column, blocks, shapes in value
        ]
        return cls(tuple(specs), tuple(dtype for _, dtype, *_ in value))


@dataclass(frozen=True)
class Transfer:
    """A part of a parameter, from a sender to a receiver (both by number)."""

    sender: int
    receiver: int
    source: ParamMeta
    target: ParamMeta


@dataclass(frozen=True)
class Parcel:
    """What one rank sends another in one message; the parts lie in it by their metas' offsets."""

    transfers: tuple[Transfer, ...]

    @property
    def sender(self) -> int:
        return self.transfers[0].sender

    @property
    def receiver(self) -> int:
        return self.transfers[0].receiver

    @property
    def num_bytes(self) -> int:
        """Of the message, gaps included."""
        last = self.transfers[-1].target
        return last.offset + last.num_bytes


@dataclass(frozen=True)
class TransferPlan:
    """The parcels of an update, in rounds; a receiver gets at most `bucket_bytes` in a round."""

    rounds: tuple[tuple[Parcel, ...], ...]
    digest: str

    @property
    def transfers(self) -> Iterator[Transfer]:
        """All of them, in the order of sending."""
        return (t for parcels in self.rounds for parcel in parcels for t in parcel.transfers)

    @property
    def round_bytes(self) -> int:
        """The most that two ranks exchange in a round, gaps included."""
        totals = Counter[tuple[int, int, int]]()
        for i, parcels in enumerate(self.rounds):
            for parcel in parcels:
                totals[i, parcel.sender, parcel.receiver] += aligned(parcel.num_bytes)
        return max(totals.values(), default=0)

    def bytes_to(self, receiver: int) -> int:
        """How much a receiver gets, gaps not counted."""
        return sum(t.target.num_bytes for t in self.transfers if t.receiver == receiver)


def make_plan(
    senders: Sequence[Holding], receivers: Sequence[Holding], bucket_bytes: int
) -> TransferPlan:
    """Plan how the receivers get all that they hold, each part once, from any that holds it.

    Parts that several senders hold are spread over these by bytes. Raises WeightSyncError if the
    two sides are not of one model in one dtype: nothing is cast on the way.
    """
    if bucket_bytes < ALIGN:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least {ALIGN}")
    pieces = defaultdict[str, list[_Piece]](list)
    for sender, holding in enumerate(senders):
        for piece in _pieces(sender, holding):
            pieces[piece.hf_name].append(piece)
    _require_same_model(pieces, senders, receivers)
    load = Counter[int]()
    transfers = [
        part
        for receiver, holding in enumerate(receivers)
        for spec, dtype in zip(holding.specs, holding.dtypes, strict=True)
        for whole in _transfers_to(receiver, spec, dtype, pieces, load)
        for part in _cut(whole, bucket_bytes)
    ]
    rounds = tuple(tuple(_parcels(parts)) for parts in _rounds(transfers, bucket_bytes))
    found = [
        [(t.sender, t.receiver, *_as_plain(t.source), *_as_plain(t.target)) for t in p.transfers]
        for parcels in rounds
        for p in parcels
    ]
    return TransferPlan(rounds, hashlib.sha256(encode(found)).hexdigest()[:16])


def _as_plain(meta: ParamMeta) -> tuple[Any, ...]:
    return meta.name, meta.shape, meta.dtype, meta.offset, meta.start


@dataclass(frozen=True)
class _Piece:
    """Rows `hf_row` and on of a Hugging Face tensor, as a rank's parameter has them from `row`."""

    sender: int
    spec: ParamSpec
    dtype: str
    row: int
    hf_name: str
    hf_row: int
    num_rows: int

    @property
    def columns(self) -> tuple[int, int]:
        """First and end, in the Hugging Face tensor."""
        return _columns(self.spec)


def _columns(spec: ParamSpec) -> tuple[int, int]:
    return spec.column_start, spec.column_start + math.prod(spec.shape[1:])


def _pieces(sender: int, holding: Holding) -> Iterator[_Piece]:
    for spec, dtype in zip(holding.specs, holding.dtypes, strict=True):
        for b in spec.blocks:
            yield _Piece(sender, spec, dtype, b.start, b.hf_name, b.hf_start, b.num_rows)


def _require_same_model(
    pieces: Mapping[str, Sequence[_Piece]],
    senders: Sequence[Holding],
    receivers: Sequence[Holding],
) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for holding in (*senders, *receivers):
        for spec in holding.specs:
            for name, shape in spec.hf_shapes.items():
                if shapes.setdefault(name, shape) != shape:
                    raise WeightSyncError(
                        f"the two sides hold different models: {name} is {shapes[name]} and {shape}"
                    )
    wanted = {b.hf_name for h in receivers for spec in h.specs for b in spec.blocks}
    if extra := sorted(set(pieces) - wanted):
        raise WeightSyncError(f"no receiver has a place for {', '.join(extra[:5])}")


def _transfers_to(
    receiver: int,
    spec: ParamSpec,
    dtype: str,
    pieces: Mapping[str, Sequence[_Piece]],
    load: Counter[int],
) -> list[Transfer]:
    """What fills one parameter; neighbours that lie side by side at both ends are one."""
    found: list[tuple[_Piece, int, int, int, tuple[int, int]]] = []
    chosen: set[int] = set()
    for block in spec.blocks:
        for hf_row, count, columns, holders in _atoms(block, _columns(spec), pieces):
            if not holders:
                raise WeightSyncError(
                    f"no sender holds rows {hf_row} to {hf_row + count - 1} of {block.hf_name}, "
                    f"which {spec.name} needs"
                )
            known = [p for p in holders if p.sender in chosen]
            piece = min(known or holders, key=lambda p: (load[p.sender], p.sender))
            chosen.add(piece.sender)
            if piece.dtype != dtype:
                raise WeightSyncError(
                    f"{spec.name} is {dtype} at the receiver, and at the sender {piece.spec.name} "
                    f"is {piece.dtype}: nothing is cast on the way"
                )
            source_row = piece.row + hf_row - piece.hf_row
            row = block.start + hf_row - block.hf_start
            if found:
                before, there, here, length, same = found[-1]
                follows = (there + length, here + length, before.spec) == (
                    *(source_row, row, piece.spec),
                )
                if follows and before.sender == piece.sender and same == columns:
                    found[-1] = (before, there, here, length + count, columns)
                    continue
            found.append((piece, source_row, row, count, columns))
    transfers = []
    for piece, source_row, row, count, columns in found:
        source = _region(piece.spec, dtype, source_row, count, columns)
        target = _region(spec, dtype, row, count, columns)
        transfers.append(Transfer(piece.sender, receiver, source, target))
        load[piece.sender] += target.num_bytes
    return transfers


def _atoms(
    block: RowBlock, columns: tuple[int, int], pieces: Mapping[str, Sequence[_Piece]]
) -> Iterator[tuple[int, int, tuple[int, int], list[_Piece]]]:
    """Rectangles of a block that no holder's border cuts: first row, rows, columns, holders."""
    first, end = block.hf_start, block.hf_start + block.num_rows
    near = [
        p
        for p in pieces.get(block.hf_name, ())
        if p.hf_row < end
        and first < p.hf_row + p.num_rows
        and p.columns[0] < columns[1]
        and columns[0] < p.columns[1]
    ]
    rows = _cuts(first, end, [x for p in near for x in (p.hf_row, p.hf_row + p.num_rows)])
    sides = _cuts(*columns, [x for p in near for x in p.columns])
    for top, bottom in pairwise(rows):
        for left, right in pairwise(sides):
            holders = [
                p
                for p in near
                if p.hf_row <= top
                and bottom <= p.hf_row + p.num_rows
                and p.columns[0] <= left
                and right <= p.columns[1]
            ]
            yield top, bottom - top, (left, right), holders


def _cuts(first: int, end: int, borders: Iterable[int]) -> list[int]:
    return sorted({first, end, *(x for x in borders if first < x < end)})


def _region(
    spec: ParamSpec, dtype: str, row: int, num_rows: int, columns: tuple[int, int]
) -> ParamMeta:
    """Rows of a parameter, and of a matrix the columns that have these places in the whole one."""
    shape: tuple[int, ...] = (num_rows,)
    start: tuple[int, ...] = (row,)
    if len(spec.shape) > 1:
        shape, start = (num_rows, columns[1] - columns[0]), (row, columns[0] - spec.column_start)
    whole = shape == spec.shape
    return ParamMeta(spec.name, shape, dtype, 0, None if whole else start)


def _cut(transfer: Transfer, bucket_bytes: int) -> Iterator[Transfer]:
    """Parts of at most bucket_bytes, or of one row."""
    shape, target = transfer.target.shape, transfer.target
    step = max(1, bucket_bytes * shape[0] // target.num_bytes)
    if step >= shape[0]:
        yield transfer
        return

    def rows(meta: ParamMeta, first: int, count: int) -> ParamMeta:
        start = meta.start or (0,) * len(meta.shape)
        start = (start[0] + first, *start[1:])
        return ParamMeta(meta.name, (count, *meta.shape[1:]), meta.dtype, 0, start)

    for first in range(0, shape[0], step):
        count = min(step, shape[0] - first)
        source, target = (rows(m, first, count) for m in (transfer.source, transfer.target))
        yield Transfer(transfer.sender, transfer.receiver, source, target)


def _rounds(transfers: Iterable[Transfer], bucket_bytes: int) -> list[list[Transfer]]:
    """Each transfer in the first round, from its receiver's last one on, that has room for it."""
    rounds: list[list[Transfer]] = []
    last, used = Counter[int](), Counter[int]()
    for transfer in transfers:
        receiver, num_bytes = transfer.receiver, aligned(transfer.target.num_bytes)
        if used[receiver] and used[receiver] + num_bytes > bucket_bytes:
            last[receiver] += 1
            used[receiver] = 0
        used[receiver] += num_bytes
        if last[receiver] == len(rounds):
            rounds.append([])
        rounds[last[receiver]].append(transfer)
    return rounds


def _parcels(transfers: Iterable[Transfer]) -> Iterator[Parcel]:
    """Small parts of a round between two ranks in one parcel, each large one in its own."""
    small = defaultdict[tuple[int, int], list[Transfer]](list)
    for transfer in transfers:
        if transfer.target.num_bytes >= ALONE:
            yield Parcel((transfer,))
        else:
            small[transfer.sender, transfer.receiver].append(transfer)
    for parts in small.values():
        end, placed = 0, []
        for part in parts:
            source, target = (_at(meta, end) for meta in (part.source, part.target))
            placed.append(Transfer(part.sender, part.receiver, source, target))
            end += aligned(part.target.num_bytes)
        yield Parcel(tuple(placed))


def _at(meta: ParamMeta, offset: int) -> ParamMeta:
    return ParamMeta(meta.name, meta.shape, meta.dtype, offset, meta.start)
