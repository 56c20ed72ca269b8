"""The update protocol on the receiving side: begin(step), buckets, commit(digest) or abort(reason).

Weights are written in place, so between begin and commit the receiver holds a mixture. It is
`ready` again only after a commit whose tensors are complete and finite and whose digest equals the
sender's. Anything else leaves it `broken`, with the reason, until a later full update commits.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.weight_sync.buckets import bucket_over, copy_apart
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.mapping import ParamSpec
from samebit.weight_sync.types import Bucket, ParamMeta, WeightSyncError, WeightVersion


class SessionState(Enum):
    """Where a receiver stands."""

    READY = "ready"
    UPDATING = "updating"
    BROKEN = "broken"


class UpdateSession:
    """Receives versions of the parameters that `params` holds, in place.

    group: the tensor parallel ranks that hold the other shards; they commit together.
    """

    released: tuple[str, ...] = ()
    """Tags of the memory that is released: nothing is served without it."""

    def __init__(
        self,
        specs: Sequence[ParamSpec],
        params: Mapping[str, Tensor],
        version: WeightVersion,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.specs = specs
        self.params = params
        self.group = group
        self.version = version
        self.state = SessionState.READY
        self.reason = ""
        self._step = version.step
        self._received: dict[str, list[ParamMeta]] = {}

    def require_ready(self) -> None:
        """Raise WeightSyncError unless the weights are there, and one whole version."""
        if self.released:
            tags = ", ".join(self.released)
            raise WeightSyncError(f"the memory of {tags} is released; resume it first")
        if self.state is SessionState.UPDATING:
            raise WeightSyncError(f"an update to step {self._step} is under way")
        if self.state is SessionState.BROKEN:
            raise WeightSyncError(
                f"the update to step {self._step} broke off: {self.reason}; "
                "a full update makes the engine usable again"
            )

    def begin(self, step: int) -> None:
        """Start a full update to `step`. Allowed when ready or broken."""
        if self.state is SessionState.UPDATING:
            raise WeightSyncError(f"update to step {step} begun during that to step {self._step}")
        if "weights" in self.released:
            raise WeightSyncError(
                f"update to step {step}: the memory of weights is released; resume it first"
            )
        self.state, self._step, self._received = SessionState.UPDATING, step, {}

    def bucket_for(self, metas: Sequence[ParamMeta]) -> Bucket:
        """Give what these tensors are to be written into, before `receive` takes it.

        That is the parameter's own memory for one contiguous region, else an empty bucket. What
        does not fit breaks the update, and nothing is written.
        """
        self._require_updating()
        return bucket_over(metas, [self._region(meta) for meta in metas])

    def receive(self, bucket: Bucket) -> None:
        """Put a bucket's tensors into place; unknown or misshapen ones break the update."""
        self._require_updating()
        for meta in bucket.metas:
            region = self._region(meta)
            with torch.no_grad():
                copy_apart(bucket.tensor(meta), region)
            self._received.setdefault(meta.name, []).append(meta)

    def receive_in_place(self) -> None:
        """Take all tensors as arrived: the sender writes to this memory."""
        self._require_updating()
        self._received = {
            name: [ParamMeta(name, tuple(param.shape), str(param.dtype), 0)]
            for name, param in self.params.items()
        }

    def commit(self, digest: str) -> WeightVersion:
        """Check completeness, finiteness and the digest; the new version on success."""
        self._require_updating()
        missing = sorted(name for name in self.params if not self._is_whole(name))
        if missing:
            self._fail(f"{len(missing)} tensors never arrived: {', '.join(missing[:5])}")
        if bad := non_finite(self.params):
            self._fail(f"NaN or Inf in {len(bad)} tensors: {', '.join(bad[:5])}")
        own = weights_digest(self.specs, self.params, self.group)
        if own != digest:
            self._fail(f"digest {own} here, {digest} at the sender")
        self.state, self.version = SessionState.READY, WeightVersion(self._step, digest)
        return self.version

    def abort(self, reason: str) -> None:
        """End the update; the weights are a mixture and may not be used."""
        self._require_updating()
        self.state, self.reason = SessionState.BROKEN, reason

    def invalidate(self, reason: str) -> None:
        """The weights are lost: nothing is served until a full update commits."""
        if self.state is SessionState.UPDATING:
            raise WeightSyncError(f"an update to step {self._step} is under way")
        self.state, self.reason = SessionState.BROKEN, reason

    def _region(self, meta: ParamMeta) -> Tensor:
        """Where a tensor of the update goes. One that has no place here breaks the update."""
        param = self.params.get(meta.name)
        if param is None:
            self._fail(f"unknown tensor {meta.name}")
        region = meta.region_of(param)
        if region is None:
            place = "" if meta.start is None else f", from {meta.start} on,"
            self._fail(
                f"{meta.name} is {tuple(param.shape)} {param.dtype} here and "
                f"{meta.shape} {meta.dtype}{place} in the update"
            )
        if any(map(meta.overlaps, self._received.get(meta.name, []))):
            self._fail(f"{meta.name} arrived twice")
        return region

    def _is_whole(self, name: str) -> bool:
        """Whether every element of a parameter has arrived: regions do not overlap."""
        arrived = sum(meta.num_elements for meta in self._received.get(name, []))
        return arrived == self.params[name].numel()

    def _require_updating(self) -> None:
        if self.state is not SessionState.UPDATING:
            raise WeightSyncError(f"no update is under way (state: {self.state.value})")

    def _fail(self, reason: str) -> NoReturn:
        self.abort(reason)
        raise WeightSyncError(f"update to step {self._step} refused: {reason}")


def non_finite(params: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return [name for name, tensor in params.items() if not bool(tensor.isfinite().all())]
