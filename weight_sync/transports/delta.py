"""Deltas: of a transfer plan only the elements travel whose bits have changed since the last one.

A sender keeps what its receivers hold. Both ends know from the counts of changed elements how each
part of a parcel comes: not at all, as positions (int32, row by row in the part) and bits, or in
full where that is not more. So no parcel is larger than the plan has it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from samebit.weight_sync.buckets import aligned
from samebit.weight_sync.transports.peers import Parts, Round, View
from samebit.weight_sync.types import ParamMeta

Counts = dict[int, list[int]]
"""How many elements have changed, of each part that goes to a peer, in the plan's order."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Base:
    """What the receivers hold of a sender's parameters: as large as these, and on their device.

    digest: of the version that all receivers have committed and `keep` was given; "" for none.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        """params: all that the sender sends to other ranks."""
        self._copies = {name: torch.empty_like(param.detach()) for name, param in params.items()}
        self.digest = ""

    def region(self, meta: ParamMeta) -> Tensor:
        """What the receivers hold there."""
        region = meta.region_of(self._copies[meta.name])
        assert region is not None, meta
        return region

    def count_changes(self, rounds: Iterable[Round]) -> Counts:
        """Compare what is to be sent with what the receivers hold, bit by bit."""
        sums: dict[int, list[Tensor]] = {}
        for round_ in rounds:
            for parts in round_.outgoing:
                for meta, now in zip(parts.metas, parts.views, strict=True):
                    count = _is_other(now, self.region(meta)).sum()
                    sums.setdefault(parts.peer, []).append(count)
        return {peer: torch.stack(counts).tolist() for peer, counts in sums.items()}

    def keep(self, params: Mapping[str, Tensor]) -> None:
        """Take these as what the receivers hold, once they have committed it."""
        for name, copy in self._copies.items():
            copy.copy_(params[name].detach())


def only_changes(
    rounds: Iterable[Round],
    rank: int,
    told: Sequence[Counts],
    base: View,
) -> Iterator[Round]:
    """Make the rounds of a delta out of this rank's, one after another.

    What a round brought is put into place when the next one, or the end, is asked for. Nothing here
    waits for the device. told: every rank's counts.
    """
    to = {peer: iter(counts) for peer, counts in told[rank].items()}
    of = {peer: iter(counts[rank]) for peer, counts in enumerate(told) if rank in counts}
    arriving: list[tuple[Tensor, Tensor, Tensor]] = []

    def read(meta: ParamMeta, now: Tensor, count: int) -> tuple[Tensor, Tensor]:
        changed = _is_other(now, base(meta)).flatten()
        positions = changed.nonzero_static(size=count).flatten()
        return positions.int(), _bits(now)[_index(positions, now)]

    def expect(_: ParamMeta, region: Tensor, count: int) -> tuple[Tensor, Tensor]:
        positions = torch.empty(count, dtype=torch.int32, device=region.device)
        bits = torch.empty(count, dtype=_bits(region).dtype, device=region.device)
        arriving.append((region, positions, bits))
        return positions, bits

    for round_ in rounds:
        outgoing = [_changed_parts(parts, to[parts.peer], read) for parts in round_.outgoing]
        incoming = [_changed_parts(parts, of[parts.peer], expect) for parts in round_.incoming]
        if any(outgoing) or any(incoming) or round_.own:
            parts = tuple(filter(None, outgoing)), tuple(filter(None, incoming))
            yield Round(*parts, round_.own, is_computed=True)
        for region, positions, bits in arriving:
            _bits(region)[_index(positions.long(), region)] = bits
        arriving.clear()


def _changed_parts(
    parts: Parts,
    counts: Iterator[int],
    few: Callable[[ParamMeta, Tensor, int], tuple[Tensor, Tensor]],
) -> Parts | None:
    """The parcel of what has changed, None for nothing. few: positions and bits of a part."""
    metas, views, end = list[ParamMeta](), list[Tensor](), 0
    for meta, view in zip(parts.metas, parts.views, strict=True):
        if not (count := next(counts)):
            continue
        for tensor in few(meta, view, count) if _pays(meta, count) else (view,):
            metas.append(ParamMeta(meta.name, tuple(tensor.shape), str(tensor.dtype), end))
            views.append(tensor)
            end += aligned(tensor.nbytes)
    if not metas:
        return None
    return Parts(parts.peer, tuple(metas), tuple(views), metas[-1].offset + metas[-1].num_bytes)


def _pays(meta: ParamMeta, count: int) -> bool:
    """Whether positions and bits of so many elements are less than the part in full."""
    size = aligned(torch.int32.itemsize * count) + aligned(meta.torch_dtype.itemsize * count)
    return size < aligned(meta.num_bytes) and meta.num_elements <= torch.iinfo(torch.int32).max


def _bits(tensor: Tensor) -> Tensor:
    """Its elements as integers: NaN equals itself there, and -0.0 is not 0.0."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def _is_other(now: Tensor, before: Tensor) -> Tensor:
    return _bits(now) != _bits(before)


def _index(positions: Tensor, region: Tensor) -> tuple[Tensor, ...]:
    """Row, and in a matrix column, of the elements at these places, counted row by row (int64)."""
    if region.dim() == 1:
        return (positions,)
    columns = region.shape[1]
    return positions // columns, positions % columns
