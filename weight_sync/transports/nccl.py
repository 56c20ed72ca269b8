"""nccl: the bytes of a transfer plan from GPU to GPU, straight between parameters where both ends
are one piece of memory; small and strided parts go through a buffer that is packed and unpacked on
the device. Everything runs on one stream of its own, while the engine computes nothing."""

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from samebit.weight_sync.buckets import aligned
from samebit.weight_sync.meeting import on_loopback
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.nccl_library import NcclCommunicator, new_unique_id
from samebit.weight_sync.transports.peers import Parts, Round, Watch


class NcclPeers:
    """A DataPlane between GPUs. Its buffer is ordinary memory, outside of what is released."""

    name = "nccl"
    sees_deaths = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._communicator: NcclCommunicator | None = None
        self._has_moved = False
        """Whether all that moving takes, but for computed rounds, is loaded and allocated."""

    def connect(
        self,
        group: WeightGroup,
        outgoing: Sequence[int],
        incoming: Sequence[int],
        round_bytes: int,
    ) -> None:
        if group.rank == 0:
            unique = new_unique_id()
            group.tell({"nccl": unique})
        else:
            unique = group.hear()["nccl"]
        seconds = group.timeout / timedelta(seconds=1)
        with torch.cuda.device(self._device), on_loopback(group.is_local):
            self._communicator = NcclCommunicator(unique, group.rank, group.world_size, seconds)
            # Two ranks make their channels when they first talk: not in an update.
            token = torch.zeros(1024, dtype=torch.uint8, device=self._device)
            sends = [(peer, token[:512]) for peer in outgoing]
            receives = [(peer, token[512:]) for peer in incoming]
            torch.cuda.synchronize(self._device)
            self._communicator.exchange(sends, receives, self._stream, lambda: None)
            self._communicator.wait(self._stream, lambda: None)

    def move(self, rounds: Iterable[Round], watch: Watch) -> None:
        communicator = self._communicator
        assert communicator is not None
        # A kernel that waits for its other end may keep others from running, and the host from
        # loading a kernel or allocating: so nothing else runs now, and nothing that may have to be
        # loaded is started until it has ended.
        torch.cuda.synchronize(self._device)
        moved = False
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for round_ in rounds:
                round_.copy_own()
                memory = self._memory([*round_.outgoing, *round_.incoming])
                outgoing, incoming = memory[: len(round_.outgoing)], memory[len(round_.outgoing) :]
                for parts, place in zip(round_.outgoing, outgoing, strict=True):
                    if parts.in_place is None:
                        parts.pack(place)
                sends = [(p.peer, m) for p, m in zip(round_.outgoing, outgoing, strict=True)]
                receives = [(p.peer, m) for p, m in zip(round_.incoming, incoming, strict=True)]
                communicator.exchange(sends, receives, self._stream, watch)
                if round_.is_computed or not self._has_moved:
                    communicator.wait(self._stream, watch)
                moved |= not round_.is_computed
                for parts, place in zip(round_.incoming, incoming, strict=True):
                    if parts.in_place is None:
                        parts.unpack(place)
            communicator.wait(self._stream, watch)
        self._has_moved |= moved

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.abort()
            self._communicator = None

    def _memory(self, all_parts: Sequence[Parts]) -> list[Tensor]:
        """What each parcel is sent from or received into: its parts' own memory, or a buffer.

        The next round's buffer is this one's: the stream runs one after the other.
        """
        sizes = [
            0 if parts.in_place is not None else aligned(parts.num_bytes) for parts in all_parts
        ]
        if sum(sizes) > len(self._buffer):
            self._buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        places = self._buffer[: sum(sizes)].split(sizes)
        return [
            place[: parts.num_bytes] if parts.in_place is None else parts.in_place
            for parts, place in zip(all_parts, places, strict=True)
        ]
