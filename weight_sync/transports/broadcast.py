"""broadcast: to other processes, by gloo (placement.transport=gloo), written in place.

A process group of its own (rank 0 sends) beside whatever groups trainer and engine use: it needs no
default group on either side. Messages and buckets are broadcasts of that one group.

At a loopback address nothing listens on another interface. At any other all ranks have to show
that they know one secret (weight_sync.meeting), by default that of the environment.
"""

import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.weight_sync.meeting import (
    check_secret,
    host_store,
    is_loopback,
    loopback_listener,
    own_secret,
    prove_secret,
)
from samebit.weight_sync.objects import decode, encode
from samebit.weight_sync.transports.base import WeightSource
from samebit.weight_sync.transports.planes import UpdateSender
from samebit.weight_sync.types import Bucket, WeightSyncError, WeightVersion

_BACKENDS = ("gloo",)
_LAST_WORDS_S = 60
"""Seconds that an engine is given to say why its group is broken."""


class GlooGroup:
    """Ranks that have met; both planes of an update, by broadcasts (see planes)."""

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        backend: str = "gloo",
        timeout_s: float = 600.0,
        secret: str | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        """listener: a socket that already listens at a loopback `address` and `port`."""
        if backend not in _BACKENDS:
            raise ValueError(f"backend '{backend}' is unknown; use one of {sorted(_BACKENDS)}")
        secret = own_secret() if secret is None else secret
        local = is_loopback(address)
        check_secret(secret, "" if local else f"a weight group meets at {address}")
        timeout = timedelta(seconds=timeout_s)
        self.rank, self.world_size = rank, world_size
        if rank == 0 and local:
            listener = listener or loopback_listener(address, port)
            store = host_store(listener, world_size, timeout)
        else:
            store = dist.TCPStore(address, port, world_size, rank == 0, timeout)
        prove_secret(store, rank, world_size, secret, timeout)
        gloo: Any = dist.ProcessGroupGloo  # its types leave the options out
        options = gloo._Options()
        options._timeout = timeout
        options._devices = [
            gloo.create_device(hostname=address) if local else gloo.create_default_device()
        ]
        self._pg = gloo(dist.PrefixStore("weights", store), rank, world_size, options)

    def tell(self, message: dict[str, Any]) -> None:
        payload = torch.frombuffer(bytearray(encode(message)), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(payload)]), self.rank)
        self._broadcast(payload, self.rank)

    def hear(self, root: int = 0) -> dict[str, Any]:
        """Take part in the broadcast of a rank's message."""
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length, root)
        payload = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(payload, root)
        return decode(payload.numpy().tobytes())

    def exchange_answers(self, own: str = "") -> list[str]:
        """Give the answers of ranks 1 and up, by a broadcast from each in turn."""
        answers = []
        for rank in range(1, self.world_size):
            if rank == self.rank:
                self.tell({"answer": own})
                answers.append(own)
            else:
                answers.append(self.hear(rank)["answer"])
        return answers

    def send(self, bucket: Bucket) -> None:
        self._broadcast(bucket.buffer, self.rank)

    def receive(self, bucket: Bucket) -> None:
        self._broadcast(bucket.buffer, 0)

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        try:
            self._pg.broadcast(tensor, root).wait()
        except RuntimeError as error:
            raise WeightSyncError(f"the weight group lost a member: {error}") from error


class BroadcastTransport(UpdateSender):
    """To one engine in another process, which is called to take part while this one sends."""

    def __init__(self, engine: Any, backend: str = "gloo", timeout_s: float = 600.0) -> None:
        """Make a group of this process and the engine's.

        `engine` has Engine's join_weight_transport and receive_weight_update, which
        return when its process is done. The port is this process's before the engine is told it,
        and so is a secret of the two.
        """
        listener = loopback_listener()
        address, port = listener.getsockname()
        known: dict[str, Any] = {"timeout_s": timeout_s, "secret": secrets.token_hex(32)}
        join = engine.join_weight_transport
        joining = _beside(partial(join, address, port, 1, 2, backend, **known))
        try:
            with listener:
                group = GlooGroup(address, port, 0, 2, backend, listener=listener, **known)
        except Exception:
            joining.result()  # raises the engine's own error, which says more
            raise
        joining.result()
        super().__init__(group, group)
        self._engine = engine
        self._receiving: Future[Any] = joining  # is done, so nobody waits for it

    @classmethod
    def between(cls, source: WeightSource, engine: Any, folder: Path) -> Self:
        return cls(engine)

    def begin(self, step: int) -> None:
        self._require_closed(step)
        self._receiving = _beside(self._engine.receive_weight_update)
        with self._last_words():
            super().begin(step)

    def send(self, params: Mapping[str, Tensor]) -> None:
        with self._last_words():
            super().send(params)

    def commit(self, digest: str) -> WeightVersion:
        """Return once the engine serves the new version; raise its own error if it refused."""
        with self._last_words():
            super().commit(digest)
        return self._receiving.result()

    def abort(self, reason: str) -> None:
        if self._step is not None:
            with self._last_words():
                super().abort(reason)
            self._receiving.result()

    @contextmanager
    def _last_words(self) -> Iterator[None]:
        """Raise the engine's own error in place of what this end sees of it: it says more."""
        try:
            yield
        except WeightSyncError:
            with suppress(TimeoutError):
                self._receiving.result(_LAST_WORDS_S)
            raise


def _beside[T](call: Callable[[], T]) -> Future[T]:
    """Make a call on a thread, which does not keep the process from ending."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised to whoever asks for the result
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
