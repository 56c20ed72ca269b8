"""An update on two planes: messages say what comes, begin to commit; buckets carry the bytes.

The control plane is ordered: every receiver hears what it is told in the order of telling. Of each
bucket it first says what is in it, so the data plane has nothing to decide but how bytes move:
straight between parameters where a bucket is over their memory. Every receiver answers a commit, so
that a refusal carries its reason and a death is seen at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any, Protocol

import torch
from torch import Tensor

from samebit.weight_sync.buckets import cut_buckets, empty_bucket, pack
from samebit.weight_sync.transports.base import Transport, WeightSink
from samebit.weight_sync.types import Bucket, ParamMeta, WeightSyncError, WeightVersion

_OK = "ok"


class ControlPlane(Protocol):
    """Carries messages, which are plain values (weight_sync.objects), in order.

    Every method raises WeightSyncError if a member is lost.
    """

    def tell(self, message: dict[str, Any]) -> None:
        """Tell every receiver; the sender's."""

    def hear(self) -> dict[str, Any]:
        """Wait for the sender's next message; a receiver's."""

    def exchange_answers(self, own: str = "") -> list[str]:
        """Give the answers of all receivers, in their order; each gives its own."""


class DataPlane(Protocol):
    """Moves the bytes of a bucket that both ends know.

    Every method raises WeightSyncError if a member is lost.
    """

    def send(self, bucket: Bucket) -> None:
        """Move its buffer to all receivers; it may be changed once this returns."""

    def receive(self, bucket: Bucket) -> None:
        """Fill its buffer."""


class UpdateSender(Transport):
    """The sender's end. One update at a time: a second one is refused."""

    def __init__(
        self, control: ControlPlane, data: DataPlane, bucket_bytes: int = 512 << 20
    ) -> None:
        self._control, self._data = control, data
        self._bucket_bytes = bucket_bytes
        self._step: int | None = None
        """Of the update that is under way."""

    def begin(self, step: int) -> None:
        self._require_closed(step)
        self._step = step
        self._control.tell({"op": "begin", "step": step})

    def send(self, params: Mapping[str, Tensor]) -> None:
        for metas in cut_buckets(params, self._bucket_bytes):
            bucket = pack(metas, params)
            self._control.tell({"op": "bucket", "metas": [astuple(meta) for meta in metas]})
            self._data.send(bucket)

    def commit(self, digest: str) -> WeightVersion:
        step, self._step = self._step, None
        if step is None:
            raise WeightSyncError("no update is under way")
        self._control.tell({"op": "commit", "digest": digest})
        answers = self._control.exchange_answers()
        refusals = [f"rank {i + 1}: {a}" for i, a in enumerate(answers) if a != _OK]
        if refusals:
            raise WeightSyncError("; ".join(refusals))
        return WeightVersion(step, digest)

    def abort(self, reason: str) -> None:
        """Have receivers refuse to serve until a full update. Without one under way: nothing."""
        if self._step is not None:
            self._step = None
            self._control.tell({"op": "abort", "reason": reason})

    def close(self) -> None:
        del self._control, self._data

    def _require_closed(self, step: int) -> None:
        if self._step is not None:
            raise WeightSyncError(f"update to step {step} begun during that to step {self._step}")


class UpdateReceiver:
    """A receiver's end."""

    def __init__(self, control: ControlPlane, data: DataPlane) -> None:
        self._control, self._data = control, data

    def receive(self, sink: WeightSink, device: torch.device) -> None:
        """Take one update, from begin to commit or abort.

        A sink that refuses does not break the lockstep: the rest is read and dropped, and the
        sender gets the reason as the answer to its commit. If the sender dies, the sink's update is
        aborted and WeightSyncError is raised; so it is by any other error, which is raised.
        """
        begin, asked = self._control.hear(), _Asked()
        asked(sink.begin, begin["step"])
        try:
            while (message := self._control.hear())["op"] == "bucket":
                metas = [ParamMeta(*meta) for meta in message["metas"]]
                bucket = asked(sink.bucket_for, metas) or empty_bucket(metas, device)
                self._data.receive(bucket)
                asked(sink.receive, bucket)
            if message["op"] == "abort":
                asked(sink.abort, message["reason"])
                return
            asked.at_last(sink.commit, message["digest"])
        except BaseException as error:
            asked(sink.abort, str(error) or repr(error))
            raise
        refusal = asked.refusal
        self._control.exchange_answers(_OK if refusal is None else str(refusal))
        if refusal is not None:
            raise refusal


class _Asked:
    """Asks a sink until it refuses; from then on its refusal stands."""

    def __init__(self) -> None:
        self.refusal: WeightSyncError | None = None

    def __call__[T, *A](self, action: Callable[[*A], T], *args: *A) -> T | None:
        if self.refusal is None:
            try:
                return action(*args)
            except WeightSyncError as error:
                self.refusal = error
        return None

    def at_last(self, commit: Callable[[str], object], digest: str) -> None:
        """Ask for the commit in any case: tensor parallel ranks learn there what others refused."""
        try:
            commit(digest)
        except WeightSyncError as error:
            self.refusal = self.refusal or error
