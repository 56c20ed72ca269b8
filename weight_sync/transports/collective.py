"""collective: to other processes, by broadcasts of flat buckets, written in place.

A group of its own (rank 0 sends) beside whatever process groups trainer and engine use: it needs
no default group on either side. Control messages travel in the same order as the buckets;
every receiver broadcasts its answer to a commit, so that a refusal carries its reason and a death
is seen at once. The backend is gloo; NCCL would also need control messages on the device.

At a loopback address nothing listens on another interface. At any other all ranks have to show
that they know one secret (weight_sync.meeting), by default that of the environment.
"""

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from samebit.weight_sync.buckets import empty_bucket, pack, plan_buckets
from samebit.weight_sync.meeting import (
    check_secret,
    host_store,
    is_loopback,
    loopback_listener,
    own_secret,
    prove_secret,
)
from samebit.weight_sync.transports.base import WeightSink
from samebit.weight_sync.types import ParamMeta, WeightSyncError, WeightVersion

_OK = "ok"
_BACKENDS = ("gloo",)


class _Group:
    """Broadcasts of tensors and of small messages."""

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        backend: str,
        timeout_s: float,
        secret: str | None,
        listener: socket.socket | None = None,
    ) -> None:
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

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        try:
            self._pg.broadcast(tensor, root).wait()
        except RuntimeError as error:
            raise WeightSyncError(f"the weight group lost a member: {error}") from error

    def send_message(self, message: dict[str, Any]) -> None:
        payload = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        self.broadcast(torch.tensor([len(payload)]), self.rank)
        self.broadcast(payload, self.rank)

    def receive_message(self, root: int = 0) -> dict[str, Any]:
        length = torch.zeros(1, dtype=torch.int64)
        self.broadcast(length, root)
        payload = torch.empty(int(length), dtype=torch.uint8)
        self.broadcast(payload, root)
        return json.loads(bytes(payload.tolist()))

    def exchange_answers(self, own: str = "") -> list[str]:
        """The answers of ranks 1 and up, by a broadcast from each in turn."""
        answers = []
        for rank in range(1, self.world_size):
            if rank == self.rank:
                self.send_message({"answer": own})
                answers.append(own)
            else:
                answers.append(self.receive_message(rank)["answer"])
        return answers


class CollectiveSender:
    """Rank 0 of the group: the trainer's end."""

    def __init__(
        self,
        address: str,
        port: int,
        world_size: int,
        backend: str = "gloo",
        bucket_bytes: int = 512 << 20,
        timeout_s: float = 600.0,
        secret: str | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        """listener: a socket that already listens at a loopback `address` and `port`."""
        self._group = _Group(address, port, 0, world_size, backend, timeout_s, secret, listener)
        self._bucket_bytes = bucket_bytes
        self._step = 0

    def begin(self, step: int) -> None:
        """Receivers stop serving."""
        self._step = step
        self._group.send_message({"op": "begin", "step": step})

    def send(self, params: Mapping[str, torch.Tensor]) -> None:
        """Broadcast every bucket."""
        for metas in plan_buckets(params, self._bucket_bytes):
            self._group.send_message({"op": "bucket", "metas": [asdict(m) for m in metas]})
            self._group.broadcast(pack(metas, params).buffer)

    def commit(self, digest: str) -> WeightVersion:
        """Returns once every receiver has compared its digest; raises if one refused."""
        self._group.send_message({"op": "commit", "digest": digest})
        answers = self._group.exchange_answers()
        refusals = [f"rank {i + 1}: {a}" for i, a in enumerate(answers) if a != _OK]
        if refusals:
            raise WeightSyncError("; ".join(refusals))
        return WeightVersion(self._step, digest)

    def abort(self, reason: str) -> None:
        """Receivers refuse to serve until a full update."""
        self._group.send_message({"op": "abort", "reason": reason})

    def close(self) -> None:
        """Leave the group."""
        del self._group


class CollectiveReceiver:
    """A rank above 0 of the group: the engine's end."""

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        backend: str = "gloo",
        timeout_s: float = 600.0,
        secret: str | None = None,
    ) -> None:
        self._group = _Group(address, port, rank, world_size, backend, timeout_s, secret)

    def receive(self, sink: WeightSink, device: torch.device) -> None:
        """Take one update, from begin to commit or abort.

        A sink that refuses does not break the lockstep: the rest is read and dropped, and the
        sender gets the reason as the answer to its commit. If the sender dies, the sink's update is
        aborted and WeightSyncError is raised.
        """
        begin = self._group.receive_message()
        refusal = _refusal(partial(sink.begin_weight_update, begin["step"]))
        try:
            while (message := self._group.receive_message())["op"] == "bucket":
                metas = [ParamMeta(**{**m, "shape": tuple(m["shape"])}) for m in message["metas"]]
                bucket = empty_bucket(metas, device)
                self._group.broadcast(bucket.buffer)
                if refusal is None:
                    refusal = _refusal(partial(sink.receive_weights, bucket))
        except WeightSyncError as error:
            if refusal is None:
                sink.abort_weight_update(str(error))
            raise
        if message["op"] == "abort":
            if refusal is None:
                sink.abort_weight_update(message["reason"])
            return
        if refusal is None:
            refusal = _refusal(partial(sink.commit_weight_update, message["digest"]))
        self._group.exchange_answers(_OK if refusal is None else str(refusal))
        if refusal is not None:
            raise refusal


def _refusal(action: Callable[[], object]) -> WeightSyncError | None:
    try:
        action()
    except WeightSyncError as error:
        return error
    return None
