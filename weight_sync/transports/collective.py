"""collective: to other processes, by broadcasts of flat buckets, written in place.

A group of its own (rank 0 sends) beside whatever process groups trainer and engine use: it needs
no default group on either side. Control messages travel in the same order as the buckets;
receivers answer a commit through the group's store, so that a refusal carries its reason. The
backend is gloo; NCCL needs one more line in _GROUPS.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from samebit.weight_sync.plan import empty_bucket, pack, plan_buckets
from samebit.weight_sync.transports.base import WeightSink
from samebit.weight_sync.types import ParamMeta, WeightSyncError, WeightVersion

_OK = "ok"
_GROUPS: dict[str, Callable[..., Any]] = {"gloo": dist.ProcessGroupGloo}


class _Group:
    """Broadcasts from rank 0, and a store for answers."""

    def __init__(
        self, address: str, port: int, rank: int, world_size: int, backend: str, timeout_s: float
    ) -> None:
        if backend not in _GROUPS:
            raise ValueError(f"backend '{backend}' is unknown; use one of {sorted(_GROUPS)}")
        timeout = timedelta(seconds=timeout_s)
        self.rank, self.world_size = rank, world_size
        self.store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
        self._pg = _GROUPS[backend](
            dist.PrefixStore("weights", self.store), rank, world_size, timeout
        )
        self.num_updates = 0

    def broadcast(self, tensor: torch.Tensor) -> None:
        try:
            self._pg.broadcast(tensor, 0).wait()
        except RuntimeError as error:
            raise WeightSyncError(f"the weight group lost a member: {error}") from error

    def send_message(self, message: dict[str, Any]) -> None:
        payload = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        self.broadcast(torch.tensor([len(payload)]))
        self.broadcast(payload)

    def receive_message(self) -> dict[str, Any]:
        length = torch.zeros(1, dtype=torch.int64)
        self.broadcast(length)
        payload = torch.empty(int(length), dtype=torch.uint8)
        self.broadcast(payload)
        return json.loads(bytes(payload.tolist()))

    def answer_key(self, rank: int) -> str:
        return f"answer/{self.num_updates}/{rank}"


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
    ) -> None:
        self._group = _Group(address, port, 0, world_size, backend, timeout_s)
        self._bucket_bytes = bucket_bytes
        self._step = 0

    def begin(self, step: int) -> None:
        """Receivers stop serving."""
        self._step = step
        self._group.num_updates += 1
        self._group.send_message({"op": "begin", "step": step})

    def send(self, params: Mapping[str, torch.Tensor]) -> None:
        """Broadcast every bucket."""
        for metas in plan_buckets(params, self._bucket_bytes):
            self._group.send_message({"op": "bucket", "metas": [asdict(m) for m in metas]})
            self._group.broadcast(pack(metas, params).buffer)

    def commit(self, digest: str) -> WeightVersion:
        """Returns once every receiver has compared its digest; raises if one refused."""
        self._group.send_message({"op": "commit", "digest": digest})
        answers = [
            self._group.store.get(self._group.answer_key(rank)).decode()
            for rank in range(1, self._group.world_size)
        ]
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
    ) -> None:
        self._group = _Group(address, port, rank, world_size, backend, timeout_s)

    def receive(self, sink: WeightSink, device: torch.device) -> None:
        """Take one update, from begin to commit or abort.

        A sink that refuses a bucket does not break the lockstep: the rest is read and dropped, and
        the sender gets the reason as the answer to its commit. If the sender dies, the sink's
        update is aborted and WeightSyncError is raised.
        """
        begin = self._group.receive_message()
        self._group.num_updates += 1
        sink.begin_weight_update(begin["step"])
        refusal: WeightSyncError | None = None
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
        answer = _OK if refusal is None else str(refusal)
        self._group.store.set(self._group.answer_key(self._group.rank), answer)
        if refusal is not None:
            raise refusal


def _refusal(action: Callable[[], object]) -> WeightSyncError | None:
    try:
        action()
    except WeightSyncError as error:
        return error
    return None
