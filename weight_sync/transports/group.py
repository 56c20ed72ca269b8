"""The group of an update: trainer ranks first, then engine ranks; what they say to each other.

A process group of its own beside whatever groups trainer and engine use: it needs no default group
on either side. Messages are plain values (weight_sync.objects) over gloo; bytes of weights go by
another way (see peers).

At a loopback address nothing listens on another interface. At any other all ranks have to show
that they know one secret (weight_sync.meeting), by default that of the environment.
"""

import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.weight_sync.meeting import (
    check_place,
    check_secret,
    host_store,
    is_loopback,
    loopback_listener,
    names_interface,
    own_address,
    own_secret,
    prove_secret,
)
from samebit.weight_sync.objects import decode, encode
from samebit.weight_sync.types import LostMemberError, WeightSyncError

_GIVEN_UP = "given_up"
_LOOK_S = 0.02


class WeightGroup:
    """Ranks that have met. Every method raises LostMemberError if a member is lost or silent."""

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        timeout_s: float = 600.0,
        secret: str | None = None,
        listener: socket.socket | None = None,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        """listener: a socket that already listens at `address` and `port`. watch: raises if the
        others are known not to come; asked now and then while they are waited for.

        timeout_s: how long a member is waited for. Raises ValueError for another secret.
        """
        secret = own_secret() if secret is None else secret
        check_place(address, port, rank, world_size, timeout_s)
        self.is_local = is_loopback(address)
        check_secret(secret, "" if self.is_local else f"a weight group meets at {address}")
        self.timeout = timedelta(seconds=timeout_s)
        self.rank, self.world_size = rank, world_size
        if rank == 0 and (self.is_local or listener is not None):
            listener = listener or loopback_listener(address, port)
            self._store: Any = host_store(listener, world_size, self.timeout)
        else:
            try:
                self._store = dist.TCPStore(address, port, world_size, rank == 0, self.timeout)
            except RuntimeError as error:
                raise LostMemberError(f"no weight group at {address}:{port}: {error}") from error
        try:
            prove_secret(self._store, rank, world_size, secret, self.timeout, watch)
        except BaseException as error:
            self._store = None
            traceback.clear_frames(error.__traceback__)  # they hold it, for which others would wait
            raise
        self._address = address if self.is_local else own_address(address, port)
        self._looked = 0.0
        self._pg = self.gloo("messages")

    def gloo(self, name: str) -> Any:
        """Another gloo process group of these ranks; all make it."""
        gloo: Any = dist.ProcessGroupGloo  # its types leave the options out
        options = gloo._Options()
        options._timeout = self.timeout
        options._devices = [
            gloo.create_default_device()
            if names_interface() and not self.is_local
            else gloo.create_device(hostname=self._address)
        ]
        store = dist.PrefixStore(name, self._store)
        with lost_members():
            return gloo(store, self.rank, self.world_size, options)

    def close(self) -> None:
        """Let go of the sockets: who waits for this rank hears that it is gone."""
        self._pg = self._store = None

    def give_up(self, reason: str) -> None:
        """Tell whoever asks `require_going_on`; the group is of no use any more."""
        with suppress(RuntimeError):  # rank 0 is gone: they see that
            self._store.set(_GIVEN_UP, reason)

    def require_going_on(self) -> None:
        """Raise WeightSyncError if a rank has given up; asked as often as one likes.

        It waits for nobody, so that a rank that fails beside it can let go of the group.
        """
        if time.monotonic() - self._looked < _LOOK_S:
            return
        with lost_members():
            reason = self._store.get(_GIVEN_UP) if self._store.check([_GIVEN_UP]) else None
        if reason is not None:
            raise WeightSyncError(reason.decode(errors="replace"))
        self._looked = time.monotonic()

    def tell(self, message: dict[str, Any]) -> None:
        """Tell all others; they `hear` it from this rank."""
        payload = torch.frombuffer(bytearray(encode(message)), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(payload)]), self.rank)
        self._broadcast(payload, self.rank)

    def hear(self, root: int = 0) -> dict[str, Any]:
        """Wait for what a rank tells."""
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length, root)
        payload = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(payload, root)
        return decode(payload.numpy().tobytes())

    def exchange(self, own: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        data = torch.frombuffer(bytearray(encode(own)), dtype=torch.uint8)
        lengths = [int(n) for n in self._gather(torch.tensor([len(data)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = zip(self._gather(padded), lengths, strict=True)
        return [decode(part[:n].numpy().tobytes()) for part, n in parts]

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        with lost_members():
            self._pg.allgather([parts], [x]).wait()
        return parts

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        with lost_members():
            self._pg.broadcast(tensor, root).wait()


@contextmanager
def lost_members() -> Iterator[None]:
    """Say in our words what torch says of a member that is dead or silent."""
    try:
        yield
    except RuntimeError as error:
        raise LostMemberError(f"the weight group lost a member: {error}") from error
