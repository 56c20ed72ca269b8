"""How a trainer's weights reach who serves them: they are shared, or they are moved.

A trainer's side is a WeightSync, which is a Lease or a Transport; the receiver's side a WeightSink.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

import torch.distributed as dist
from torch import Tensor

from samebit.weight_sync.mapping import ParamSpec
from samebit.weight_sync.types import Bucket, ParamMeta, WeightVersion


class WeightSink(Protocol):
    """A receiver of versions in this process; the engine is one."""

    def begin(self, step: int) -> WeightVersion | None:
        """Refuse new work from here on; the weights become a mixture.

        Returns the version that they were, None if they were none.
        """

    def bucket_for(self, metas: Sequence[ParamMeta]) -> Bucket:
        """Give what these tensors are to be written into: parameters' own memory if possible."""

    def receive(self, bucket: Bucket) -> None:
        """Put a bucket's tensors into place."""

    def expect(self, metas: Sequence[ParamMeta]) -> Sequence[Tensor]:
        """Give the memory of these regions, which is going to be written."""

    def arrived(self, metas: Sequence[ParamMeta]) -> None:
        """Take these regions, which `expect` gave, as written."""

    def cancel(self) -> None:
        """End an update of which nothing was handed out: the version before stays."""

    def receive_in_place(self, params: Mapping[str, Tensor]) -> None:
        """Accept that `params`, the receiver's own memory, already hold the new version."""

    def commit(self, digest: str) -> WeightVersion:
        """Check what arrived against the sender's digest and serve it."""

    def abort(self, reason: str) -> None:
        """Give up; the receiver refuses to serve until a full update commits."""


class WeightSource(Protocol):
    """Who makes versions; a trainer is one."""

    step: int
    """The optimizer step that made the present weights."""
    params: Mapping[str, Tensor]
    """The live parameters of this process, by their engine (Megatron) names."""
    specs: list[ParamSpec]
    """What each of them is."""

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The processes that hold the other layers of the model."""


class WeightSync(ABC):
    """Has an engine serve a trainer's versions: `lease`, train, `update`; or `give_up` on an error.

    An engine that shares the trainer's memory serves nothing from `lease` to `update`: Lease. One
    with memory of its own serves the version before until `update`: Transport. Where its memory
    is released meanwhile it serves nothing until that is resumed.
    """

    @classmethod
    def between(cls, source: WeightSource, engine: Any, folder: Path) -> Self:
        """Make one for a trainer and its engine; what it writes goes into `folder`."""
        raise NotImplementedError(f"{cls.__name__} is made otherwise")

    @abstractmethod
    def lease(self, step: int) -> None:
        """Say that the weights of `step` are going to be made: memory that is shared is leased."""

    @abstractmethod
    def update(self, params: Mapping[str, Tensor], digest: str) -> WeightVersion:
        """Serve `params`, whose digest this is, as the step that `lease` named.

        Raises WeightSyncError if the engine refused them; it then serves nothing, or the version
        before.
        """

    @abstractmethod
    def give_up(self, reason: str) -> None:
        """Give the step up: shared memory, which may hold half of it, is not served any more."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what is held: nothing, unless a subclass says otherwise."""


class Lease(WeightSync):
    """For a receiver whose memory is the sender's: nothing moves."""

    def __init__(self, sink: WeightSink) -> None:
        self._sink = sink

    def lease(self, step: int) -> None:
        """Have the engine stop serving, so that no rollout can see half a step."""
        self._sink.begin(step)

    def update(self, params: Mapping[str, Tensor], digest: str) -> WeightVersion:
        """Have the engine check that it holds this very memory, and its digest."""
        self._sink.receive_in_place(params)
        return self._sink.commit(digest)

    def give_up(self, reason: str) -> None:
        """Have the engine refuse to serve until an update."""
        self._sink.abort(reason)


class Transport(WeightSync):
    """Moves weights. Every method raises WeightSyncError if a receiver refused.

    An update is `begin`, `send`, `commit`; or `abort` before `commit`. Until `begin` receivers
    serve the version before it, if their memory is resident; a commit that is refused has ended the
    update too.
    """

    _leased = 0

    def lease(self, step: int) -> None:
        """Remember the step: nothing is shared."""
        self._leased = step

    def update(self, params: Mapping[str, Tensor], digest: str) -> WeightVersion:
        """Begin, send and commit; abort if the sending breaks off."""
        self.begin(self._leased)
        try:
            self.send(params)
        except BaseException as error:
            with suppress(RuntimeError):  # the first error is the one to tell
                self.abort(str(error) or repr(error))
            raise
        return self.commit(digest)

    def give_up(self, reason: str) -> None:
        """Do nothing: receivers serve the version before, once their memory is resident."""

    @abstractmethod
    def begin(self, step: int) -> None:
        """Begin an update to `step`. Receivers that are written in place stop serving."""

    @abstractmethod
    def send(self, params: Mapping[str, Tensor]) -> None:
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
        self._sink.begin(step)

    def commit(self, digest: str) -> WeightVersion:
        return self._sink.commit(digest)

    def abort(self, reason: str) -> None:
        self._sink.abort(reason)
