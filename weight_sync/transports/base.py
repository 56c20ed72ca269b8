"""The two ends of every transport. One update: begin, send, commit; or abort at any point."""

from collections.abc import Mapping
from typing import Protocol

import torch

from samebit.weight_sync.types import Bucket, WeightVersion


class WeightSink(Protocol):
    """A receiver of versions; the engine is one."""

    def begin_weight_update(self, step: int) -> None:
        """Refuse new work from here on; the weights become a mixture."""

    def receive_weights(self, bucket: Bucket) -> None:
        """Copy a bucket's tensors into place."""

    def receive_weights_in_place(self, params: Mapping[str, torch.Tensor]) -> None:
        """Accept that `params`, the receiver's own memory, already hold the new version."""

    def commit_weight_update(self, digest: str) -> WeightVersion:
        """Check what arrived against the sender's digest and serve it."""

    def abort_weight_update(self, reason: str) -> None:
        """Give up; the receiver refuses to serve until a full update commits."""


class Transport(Protocol):
    """The sender's end. Every method raises WeightSyncError if a receiver refused."""

    def begin(self, step: int) -> None:
        """Receivers stop serving; with shared memory this must precede the optimizer's writes."""

    def send(self, params: Mapping[str, torch.Tensor]) -> None:
        """Move all parameters, in place at the receivers."""

    def commit(self, digest: str) -> WeightVersion:
        """Receivers compare digests and serve the new version; returns once all have."""

    def abort(self, reason: str) -> None:
        """Tell the receivers that the update broke off."""

    def close(self) -> None:
        """Release sockets and groups."""


class SinkTransport:
    """For receivers in the sender's own process: all of an update but `send`."""

    def __init__(self, sink: WeightSink) -> None:
        self._sink = sink

    def begin(self, step: int) -> None:
        """The engine stops serving."""
        self._sink.begin_weight_update(step)

    def commit(self, digest: str) -> WeightVersion:
        """The engine checks the digest and serves the new version."""
        return self._sink.commit_weight_update(digest)

    def abort(self, reason: str) -> None:
        """The engine refuses to serve until a full update commits."""
        self._sink.abort_weight_update(reason)

    def close(self) -> None:
        """Nothing is held."""
