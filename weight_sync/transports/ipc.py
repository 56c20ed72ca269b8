"""ipc: the bytes of a transfer plan between processes on one GPU, through buckets that both see.

The sender has two buckets for each receiver, in ordinary CUDA memory. It fills one while the
receiver empties the other, and fills none before the receiver has said that it is done with it.
What a receiver had open when it was killed, torch keeps until the sender's process ends.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from samebit.weight_sync.buckets import aligned
from samebit.weight_sync.transports.group import WeightGroup, lost_members
from samebit.weight_sync.transports.peers import Parts, Round, Watch
from samebit.weight_sync.types import WeightSyncError

_NUM_BUCKETS = 2
_FULL, _EMPTY = 1, 2  # tags of what is said about a bucket


class IpcPeers:
    """A DataPlane within one GPU."""

    name = "ipc"
    sees_deaths = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buckets: dict[int, list[Tensor]] = {}  # by peer
        self._said: Any = None  # a gloo process group
        self._told: list[tuple[Any, Tensor]] = []  # on its way

    def connect(
        self,
        group: WeightGroup,
        outgoing: Sequence[int],
        incoming: Sequence[int],
        round_bytes: int,
    ) -> None:
        self._said = group.gloo("buckets")
        gpu = str(torch.cuda.get_device_properties(self._device).uuid)
        handles: dict[int, list[tuple[Any, ...]]] = {}
        for peer in outgoing:
            self._buckets[peer] = [
                torch.empty(round_bytes, dtype=torch.uint8, device=self._device)
                for _ in range(_NUM_BUCKETS)
            ]
            handles[peer] = [b.untyped_storage()._share_cuda_() for b in self._buckets[peer]]
        members = group.exchange((gpu, handles))
        for peer in (*outgoing, *incoming):
            if members[peer][0] != gpu:
                raise WeightSyncError(
                    f"transport ipc is for processes on one GPU: rank {group.rank} is on {gpu}, "
                    f"rank {peer} on {members[peer][0]}; use nccl"
                )
        for peer in incoming:
            given = members[peer][1][group.rank]
            self._buckets[peer] = [self._open(handle) for handle in given]

    def move(self, rounds: Iterable[Round], watch: Watch) -> None:
        filled, emptied = Counter[int](), Counter[int]()
        torch.cuda.synchronize(self._device)
        for round_ in rounds:
            round_.copy_own()
            for peer, parcels in _by_peer(round_.outgoing).items():
                if filled[peer] >= _NUM_BUCKETS:
                    self._hear(peer, _EMPTY)
                bucket = self._buckets[peer][filled[peer] % _NUM_BUCKETS]
                for parts, place in _placed(parcels, bucket):
                    parts.pack(place)
                self._say(peer, _FULL)
                filled[peer] += 1
            for peer, parcels in _by_peer(round_.incoming).items():
                self._hear(peer, _FULL)
                bucket = self._buckets[peer][emptied[peer] % _NUM_BUCKETS]
                for parts, place in _placed(parcels, bucket):
                    parts.unpack(place)
                self._say(peer, _EMPTY)
                emptied[peer] += 1
        for peer, count in filled.items():
            for _ in range(min(count, _NUM_BUCKETS)):
                self._hear(peer, _EMPTY)
        with lost_members():
            for work, _ in self._told:
                work.wait()
        self._told.clear()

    def close(self) -> None:
        self._buckets.clear()
        self._told.clear()
        self._said = None

    def _say(self, peer: int, what: int) -> None:
        """Once the copies have run. Nobody waits until it is heard: each would for the other."""
        torch.cuda.current_stream(self._device).synchronize()
        token = torch.zeros(1)
        with lost_members():
            self._told.append((self._said.send([token], peer, what), token))

    def _hear(self, peer: int, what: int) -> None:
        with lost_members():
            self._said.recv([torch.zeros(1)], peer, what).wait()

    def _open(self, handle: tuple[Any, ...]) -> Tensor:
        """The sender's bucket; its number of the GPU may be another than this process's."""
        storage = torch.UntypedStorage._new_shared_cuda(self._device.index, *handle[1:])
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)


def _by_peer(parcels: Sequence[Parts]) -> dict[int, list[Parts]]:
    found: dict[int, list[Parts]] = {}
    for parts in parcels:
        found.setdefault(parts.peer, []).append(parts)
    return found


def _placed(parcels: Sequence[Parts], bucket: Tensor) -> Iterator[tuple[Parts, Tensor]]:
    """Parcels one behind another in a bucket."""
    start = 0
    for parts in parcels:
        yield parts, bucket[start : start + parts.num_bytes]
        start += aligned(parts.num_bytes)
