"""How a trainer's weights reach who serves them: they are shared, or they are moved.

Shared memory is leased: Lease. Weights that are moved arrive in memory of the receivers' own:
Transport. A trainer's side needs one of the two and knows it as a WeightSync (weight_sync/sync.py);
the receiver's side is a WeightSink.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist

from samebit.weight_sync.mapping import ParamSpec
from samebit.weight_sync.types import Bucket, ParamMeta, WeightVersion


class WeightSink(Protocol):
    """A receiver of versions in this process; the engine is one."""

    def begin_weight_update(self, step: int) -> None:
        """Refuse new work from here on; the weights become a mixture."""

    def bucket_for(self, metas: Sequence[ParamMeta]) -> Bucket:
        """Give what these tensors are to be written into: parameters' own memory if possible."""

    def receive_weights(self, bucket: Bucket) -> None:
        """Put a bucket's tensors into place."""

    def receive_weights_in_place(self, params: Mapping[str, torch.Tensor]) -> None:
        """Accept that `params`, the receiver's own memory, already hold the new version."""

    def commit_weight_update(self, digest: str) -> WeightVersion:
        """Check what arrived against the sender's digest and serve it."""

    def abort_weight_update(self, reason: str) -> None:
        """Give up; the receiver refuses to serve until a full update commits."""


class WeightSource(Protocol):
    """Who makes versions; a trainer is one."""

    step: int
    """The optimizer step that made the present weights."""
    params: Mapping[str, torch.Tensor]
    """The live parameters of this process, by their engine (Megatron) names."""
    specs: list[ParamSpec]
    """What each of them is."""

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The processes that hold the other layers of the model."""


class Way:
    """A way of weights from their source to who serves them: a Lease or a Transport."""

    @classmethod
    def between(cls, source: WeightSource, engine: Any, folder: Path) -> Self:
        """Make one for a trainer and its engine; what it writes goes into `folder`."""
        raise NotImplementedError(f"{cls.__name__} is made otherwise")

    def close(self) -> None:
        """Let go of what is held: nothing, unless a subclass says otherwise."""


class Lease(Way, ABC):
    """Receivers whose memory is the sender's. Every method raises WeightSyncError if one refused.

    An update is `take`, the optimizer's writes, `commit`; or `abort` at any point after `take`.
    """

    @abstractmethod
    def take(self, step: int) -> None:
        """Have receivers stop serving: from here on the memory may hold half of `step`."""

    @abstractmethod
    def commit(self, params: Mapping[str, torch.Tensor], digest: str) -> WeightVersion:
        """Have receivers check that `params` are their memory, and serve what it holds."""

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Tell receivers that the memory may hold half a step: they refuse until a commit."""


class Transport(Way, ABC):
    """Moves weights. Every method raises WeightSyncError if a receiver refused.

    An update is `begin`, `send`, `commit`; or `abort` before `commit`. Until `begin` receivers
    serve the version before it; a commit that is refused has ended the update too.
    """

    @abstractmethod
    def begin(self, step: int) -> None:
        """Begin an update to `step`. Receivers that are written in place stop serving."""

    @abstractmethod
    def send(self, params: Mapping[str, torch.Tensor]) -> None:
        """Move all parameters."""

    @abstractmethod
    def commit(self, digest: str) -> WeightVersion:
        """Have receivers compare digests and serve the new version; returns once all do."""

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Tell receivers that the update broke off."""


class SinkTransport(Transport):
    """For a receiver in the sender's own process: all of an update but `send`."""

    def __init__(self, sink: WeightSink) -> None:
        self._sink = sink

    def begin(self, step: int) -> None:
        """Have the engine stop serving."""
        self._sink.begin_weight_update(step)

    def commit(self, digest: str) -> WeightVersion:
        """Have the engine check the digest and serve the new version."""
        return self._sink.commit_weight_update(digest)

    def abort(self, reason: str) -> None:
        """Have the engine refuse to serve until a full update commits."""
        self._sink.abort_weight_update(reason)
