"""The update protocol on the receiving side: begin(step), buckets, commit(digest) or abort(reason).

Weights are written in place, so between begin and commit the receiver holds a mixture. It is
`ready` again only after a commit whose tensors are complete and finite and whose digest equals the
sender's. Anything else leaves it `dirty`, with the reason, until a later full update commits.

Tensor parallel ranks commit together: what one of them refuses, all refuse. So whoever drives an
update calls commit (or abort) on every rank, also on one that has refused a tensor before.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.weight_sync.buckets import bucket_over, copy_apart
from samebit.weight_sync.digest import Digester, as_digest
from samebit.weight_sync.mapping import ParamSpec
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.types import Bucket, ParamMeta, WeightSyncError, WeightVersion

type Content = Literal["old", "new", "unknown"]
"""What a tensor of a dirty receiver holds."""


class SessionState(Enum):
    """Where a receiver stands."""

    READY = "ready"
    UPDATING = "updating"
    DIRTY = "dirty"
    RELEASED = "released"


class UpdateSession:
    """Receives versions of the parameters that `params` holds, in place.

    group: the tensor parallel ranks that hold the other shards; they commit together.
    shared: the memory is the sender's own, who may write to all of it from `begin` on. tag: what
    that memory is released by.
    """

    released: tuple[str, ...] = ()
    """Tags of the memory that is released: nothing is served without it."""

    def __init__(
        self,
        specs: Sequence[ParamSpec],
        params: Mapping[str, Tensor],
        version: WeightVersion,
        group: dist.ProcessGroup | None = None,
        shared: bool = False,
        tag: str = "weights",
    ) -> None:
        self.specs = specs
        self.params = params
        self.group = group
        self.tag = tag
        self.version = version
        self.reason = ""
        self._shared = shared
        self._state = SessionState.READY
        self.is_refused = False  # by this rank, before its commit: the others do not know yet
        self._broke_off = ""  # what made it dirty
        self._oldest = version.step  # that may be begun
        self._digester = Digester(specs, params)
        self._step = version.step
        self.num_begun = 0
        """Updates so far: it tells the one that is under way from those of others."""
        self._num_rows = {spec.name: spec.num_rows for spec in specs}
        self._received: dict[str, list[ParamMeta]] = {}
        self._state_before, self._unknown_before = self._state, set[str]()  # as the update began
        self._unknown: set[str] = set()  # may have been written to since the last commit

    @property
    def state(self) -> SessionState:
        updating = self._state is SessionState.UPDATING
        return SessionState.RELEASED if self.released and not updating else self._state

    @property
    def is_open(self) -> bool:
        """Whether an update is under way, which a commit or abort ends; refused ones too."""
        return self._state is SessionState.UPDATING or self.is_refused

    @property
    def whole(self) -> WeightVersion | None:
        """The version that is held, whether or not it may be served; None for a mixture."""
        return self.version if self._state is SessionState.READY else None

    def digest(self) -> str:
        """weights_digest of the weights as they are now, over all ranks of the group."""
        return self._digester.digest(self.group)

    def require_ready(self) -> None:
        """Raise WeightSyncError unless the weights are there, and one whole version."""
        if self.released:
            tags = ", ".join(self.released)
            raise WeightSyncError(f"the memory of {tags} is released; resume it first")
        if self._state is SessionState.UPDATING:
            raise WeightSyncError(f"an update to step {self._step} is under way")
        if self._state is SessionState.DIRTY:
            found = list(self.report().values())
            new, unknown, old = (found.count(c) for c in ("new", "unknown", "old"))
            raise WeightSyncError(
                f"{self._broke_off}: {self.reason}; {new} tensors are new, {unknown} unknown, "
                f"{old} old; a full update makes the engine usable again"
            )

    def report(self) -> dict[str, Content]:
        """What each tensor holds: "old", untouched since the last commit; "new", the whole of what
        the last update brought; "unknown" otherwise. All are old when ready."""
        return {name: self._content(name) for name in self.params}

    def begin(self, step: int, *, may_go_back: bool = False) -> None:
        """Start a full update to `step`. Allowed when ready or dirty.

        may_go_back: the caller means a step below that of the version before it. Raises
        WeightSyncError for a stale step, an update under way, or weights whose memory is released.
        """
        if self._state is SessionState.UPDATING:
            raise WeightSyncError(f"update to step {step} begun during that to step {self._step}")
        if self.tag in self.released:
            raise WeightSyncError(
                f"update to step {step}: the memory of {self.tag} is released; resume it first"
            )
        self._require_fresh(step, may_go_back)
        self.num_begun += 1
        self._state_before, self._unknown_before = self._state, set(self._unknown)
        self._unknown.update(self.params if self._shared else ())
        self._state, self._step, self._received = SessionState.UPDATING, step, {}
        self.is_refused = False

    def rename(self, step: int, *, may_go_back: bool = False) -> None:
        """Have the update that is under way be to another step. WeightSyncError for a stale one."""
        self._require_updating()
        self._require_fresh(step, may_go_back)
        self._step = step

    def meet_sender(self) -> None:
        """Another sender is there: none of its steps is stale for those of others."""
        self._oldest = 0

    def expect(self, metas: Sequence[ParamMeta]) -> list[Tensor]:
        """The places of these regions, to be written by the caller, who then calls `arrived`.

        Views of parameters, contiguous or not; "unknown" from here on. One that does not fit
        breaks the update, and nothing is written.
        """
        self._require_updating()
        regions = [self._region(meta) for meta in metas]
        self._unknown.update(meta.name for meta in metas)
        return regions

    def arrived(self, metas: Sequence[ParamMeta]) -> None:
        """Take regions that were expected as written. What comes twice breaks the update."""
        self._require_updating()
        for meta in metas:
            self._region(meta)
            self._received.setdefault(meta.name, []).append(meta)

    def holds(self, metas: Sequence[ParamMeta]) -> bool:
        """Whether some of these regions have arrived in the update that is under way."""
        return any(
            meta.overlaps(got) for meta in metas for got in self._received.get(meta.name, [])
        )

    def bucket_for(self, metas: Sequence[ParamMeta]) -> Bucket:
        """Give what these tensors are to be written into, before `receive` takes it.

        That is the parameter's own memory for one contiguous region, else an empty bucket. What
        does not fit breaks the update, and nothing is written.
        """
        return bucket_over(metas, self.expect(metas))

    def receive(self, bucket: Bucket) -> None:
        """Put a bucket's tensors into place; unknown or misshapen ones break the update."""
        for meta in bucket.metas:
            [region] = self.expect([meta])
            with torch.no_grad():
                copy_apart(bucket.tensor(meta), region)
            self.arrived([meta])

    def receive_in_place(self) -> None:
        """Take all tensors as arrived: the sender writes to this memory."""
        self._require_updating()
        self._unknown.update(self.params)
        self._received = {meta.name: [meta] for meta in self.metas()}

    def metas(self) -> list[ParamMeta]:
        """All parameters, whole."""
        return [ParamMeta(n, tuple(p.shape), str(p.dtype), 0) for n, p in self.params.items()]

    def commit(self, digest: str | None) -> WeightVersion:
        """Check completeness, finiteness and the digest; the new version on success.

        digest: the sender's; None if it has told none. Rows of padding need not have arrived: then
        they are zero from here on. Raises WeightSyncError, on every rank, if any refuses or has
        refused a tensor before.
        """
        if not self.is_refused:
            self._require_updating()
        try:
            refusal, total = (self.reason, 0) if self.is_refused else self._look()
            refusals, total = self._gather(refusal, total, digest)
        except BaseException as error:
            self._break_off(str(error) or repr(error))
            raise
        own = as_digest([total])
        if not refusals and digest not in (None, own):
            refusals = f"digest {own} here, {digest} at the sender"
        if refusals:
            self._break_off(refusals)
            raise self._refusal(refusals)
        self._state, self.version = SessionState.READY, WeightVersion(self._step, own)
        self._oldest = self._step
        self._received, self._unknown = {}, set()
        return self.version

    def abort(self, reason: str) -> None:
        """End the update: the weights are a mixture and may not be used."""
        self._require_updating()
        self._break_off(reason)

    def cancel(self) -> None:
        """End an update of which nothing was handed out: what was before it is there, and stays.

        One that may have written is aborted.
        """
        self._require_updating()
        if self._received or self._unknown - self._unknown_before:
            self._break_off("it was given up after memory had been handed out")
        else:
            self._state = self._state_before

    def agree(self, failure: Exception | None) -> None:
        """Raise on every rank what failed on any, before an update begins."""
        told = [""] if self.group is None else gather_objects(repr(failure or ""), self.group)
        if failure is not None:
            raise failure
        if failed := [f"rank {i}: {why}" for i, why in enumerate(told) if why not in ("", "''")]:
            raise WeightSyncError("; ".join(failed))

    def abort_alike(self, reason: str) -> None:
        """`abort`, where all ranks run the update alike: those that commit it are told why.

        Does nothing if the update has ended on all ranks.
        """
        if self._state is SessionState.UPDATING:
            self._break_off(reason)
        elif not self.is_refused:
            return
        self.is_refused = False
        self._gather(self.reason, 0)

    def refuse(self, reason: str) -> NoReturn:
        """Break the update before its commit, when the other ranks learn of it."""
        self._require_updating()
        self._break_off(reason)
        self.is_refused = True
        raise self._refusal(reason)

    def invalidate(self, reason: str) -> None:
        """The weights are lost: nothing is served until a full update commits."""
        if self._state is SessionState.UPDATING:
            raise WeightSyncError(f"an update to step {self._step} is under way")
        self._received, self._unknown = {}, set(self.params)
        self._state, self.reason = SessionState.DIRTY, reason
        self._broke_off = "the weights are lost"

    # -- internals -------------------------------------------------------------------------------

    def _look(self) -> tuple[str, int]:
        """What is wrong with what this rank holds ("": nothing), and its part of the digest.

        Also what fails as it looks: the other ranks wait to hear of it.
        """
        try:
            return self._found()
        except Exception as error:  # noqa: BLE001 - told to all ranks, and raised on all
            return repr(error), 0

    def _found(self) -> tuple[str, int]:
        missing = sorted(name for name in self.params if not self._is_whole(name))
        if missing:
            return f"{len(missing)} tensors never arrived: {', '.join(missing[:5])}", 0
        self._clear_padding()
        total = self._digester.sum()
        if self._digester.all_finite:
            return "", total
        bad = non_finite(self.params)
        return f"NaN or Inf in {len(bad)} tensors: {', '.join(bad[:5])}", 0

    def _gather(self, refusal: str, total: int, digest: str | None = None) -> tuple[str, int]:
        """The refusals of all ranks ("": none), and the sum of their parts of the digest.

        digest: the sender's. Ranks that commit different updates refuse.
        """
        if self.group is None:
            return refusal, total
        told = gather_objects((refusal, total, self._step, digest), self.group)
        refusals = [f"rank {rank}: {reason}" for rank, (reason, *_) in enumerate(told) if reason]
        updates = {(step, sent) for _, _, step, sent in told}
        if len(updates) > 1 and not refusals:
            refusals = [f"the ranks commit different updates: {sorted(map(str, updates))}"]
        return "; ".join(refusals), sum(total for _, total, *_ in told)

    def _region(self, meta: ParamMeta) -> Tensor:
        """Where a tensor of the update goes. One that has no place here breaks the update."""
        param = self.params.get(meta.name)
        if param is None:
            self.refuse(f"unknown tensor {meta.name}")
        region = meta.region_of(param)
        if region is None:
            place = "" if meta.start is None else f", from {meta.start} on,"
            self.refuse(
                f"{meta.name} is {tuple(param.shape)} {param.dtype} here and "
                f"{meta.shape} {meta.dtype}{place} in the update"
            )
        if any(map(meta.overlaps, self._received.get(meta.name, []))):
            self.refuse(f"{meta.name} arrived twice")
        return region

    def _content(self, name: str) -> Content:
        if name in self._received and self._is_whole(name):
            return "new"
        return "unknown" if name in self._unknown else "old"

    def _is_whole(self, name: str) -> bool:
        """Whether every element but padding has arrived: regions do not overlap."""
        num_rows = self._num_rows[name]
        arrived = sum(meta.num_elements_in(num_rows) for meta in self._received.get(name, []))
        return arrived == self.params[name][:num_rows].numel()

    def _clear_padding(self) -> None:
        for name, num_rows in self._num_rows.items():
            param = self.params[name]
            if sum(meta.num_elements for meta in self._received.get(name, [])) < param.numel():
                with torch.no_grad():
                    param[num_rows:].zero_()

    def _require_updating(self) -> None:
        if self._state is not SessionState.UPDATING:
            raise WeightSyncError(f"no update is under way (state: {self.state.value})")

    def _require_fresh(self, step: int, may_go_back: bool) -> None:
        if step < self._oldest and not may_go_back:
            raise WeightSyncError(
                f"update to step {step} is stale: the version before it is of step {self._oldest}"
            )

    def _break_off(self, reason: str) -> None:
        self._state, self.reason, self.is_refused = SessionState.DIRTY, reason, False
        self._broke_off = f"the update to step {self._step} broke off"

    def _refusal(self, reason: str) -> WeightSyncError:
        whose = "" if self.tag == "weights" else f" of the {self.tag}"
        return WeightSyncError(f"update{whose} to step {self._step} refused: {reason}")


def non_finite(params: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return [name for name, tensor in params.items() if not bool(tensor.isfinite().all())]
