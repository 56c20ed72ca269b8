"""How the bytes of a transfer plan move: between parameters where both ends lie in one piece.

A DataPlane gets one rank's part of the plan, round by round, with views of the memory that each
parcel reads or fills.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from samebit.weight_sync.transports.group import WeightGroup, lost_members
from samebit.weight_sync.types import ParamMeta

View = Callable[[ParamMeta], Tensor]
"""Gives the memory of a region."""
Watch = Callable[[], None]
"""Called again and again while bytes are awaited; raises if they will never come."""


@dataclass(frozen=True)
class Parts:
    """One rank's end of a parcel: which rank has the other one, and the memory of each part."""

    peer: int
    """Rank of the weight group."""
    metas: tuple[ParamMeta, ...]
    """Where each part lies in the parcel (offset), its shape and dtype."""
    views: tuple[Tensor, ...]
    num_bytes: int

    @property
    def in_place(self) -> Tensor | None:
        """The memory as bytes, if it is one piece."""
        [first, *others] = self.views
        return None if others or not first.is_contiguous() else first.view(-1).view(torch.uint8)

    def pack(self, buffer: Tensor) -> None:
        """Copy the parts into a parcel's buffer."""
        torch._foreach_copy_([m.view_in(buffer) for m in self.metas], list(self.views))

    def unpack(self, buffer: Tensor) -> None:
        """Copy the parts out of a parcel's buffer."""
        torch._foreach_copy_(list(self.views), [m.view_in(buffer) for m in self.metas])


@dataclass(frozen=True)
class Round:
    """What one rank sends and receives in a round of the plan."""

    outgoing: tuple[Parts, ...]
    incoming: tuple[Parts, ...]
    own: tuple[tuple[Tensor, Tensor], ...] = ()
    """(source, target): what the rank keeps for itself."""
    is_computed: bool = False
    """Whether its parts are computed on the device when it is asked for, as those of a delta."""

    def copy_own(self) -> None:
        """Copy what no other rank takes part in."""
        if self.own:
            sources, targets = zip(*self.own, strict=True)
            torch._foreach_copy_(list(targets), list(sources))


class DataPlane(Protocol):
    """Moves bytes between ranks that know what comes."""

    name: str
    """What all ranks have to agree on."""
    sees_deaths: bool
    """Whether `move` ends by itself when a peer dies."""

    def connect(
        self,
        group: WeightGroup,
        outgoing: Sequence[int],
        incoming: Sequence[int],
        round_bytes: int,
    ) -> None:
        """Make ready for moves to and from these ranks, of at most round_bytes a round with each.

        All ranks do this at once. Raises WeightSyncError.
        """

    def move(self, rounds: Iterable[Round], watch: Watch) -> None:
        """Send and receive everything; returns when this rank's memory may be read and written.

        After a round the next one, or the end, is asked for, where whatever is queued on the
        current stream finds what the round brought. Raises WeightSyncError if a member is lost or
        silent; the plane is of no use after that.
        """

    def close(self) -> None:
        """Let go of what it holds."""


class GlooPeers:
    """Over sockets, from and to the host's memory; what lies on a device is copied there."""

    name = "gloo"
    sees_deaths = True

    def __init__(self) -> None:
        self._pg: Any = None

    def connect(
        self,
        group: WeightGroup,
        outgoing: Sequence[int],
        incoming: Sequence[int],
        round_bytes: int,
    ) -> None:
        self._pg = group.gloo("weights")

    def move(self, rounds: Iterable[Round], watch: Watch) -> None:
        for round_ in rounds:
            round_.copy_own()
            with lost_members():
                sent = [self._send(parts) for parts in round_.outgoing]
                received = [self._receive(parts) for parts in round_.incoming]
                for work, _ in sent:
                    work.wait()
                for parts, (work, buffer) in zip(round_.incoming, received, strict=True):
                    work.wait()
                    if buffer is not None:
                        parts.unpack(buffer)

    def close(self) -> None:
        self._pg = None

    def _send(self, parts: Parts) -> tuple[Any, Tensor]:
        buffer = _on_host(parts)
        if buffer is None:
            buffer = torch.empty(parts.num_bytes, dtype=torch.uint8)
            parts.pack(buffer)
        return self._pg.send([buffer], parts.peer, 0), buffer

    def _receive(self, parts: Parts) -> tuple[Any, Tensor | None]:
        """What is awaited, and a buffer that is to be unpacked then."""
        memory, buffer = _on_host(parts), None
        if memory is None:
            memory = buffer = torch.empty(parts.num_bytes, dtype=torch.uint8)
        return self._pg.recv([memory], parts.peer, 0), buffer


def _on_host(parts: Parts) -> Tensor | None:
    memory = parts.in_place
    return memory if memory is not None and memory.device.type == "cpu" else None
