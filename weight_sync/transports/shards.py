"""An update from trainer ranks to engine ranks, shard to shard, by a plan that is made once.

Rank 0 leads: it tells begin, send, and commit or abort, and after each of them but abort every rank
answers to all. So no byte moves before all ranks have said that they know the same plan and are
ready, a refusal carries its reason to every rank, and nobody waits for one that has refused.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Any

from torch import Tensor

from samebit.weight_sync.mapping import ParamSpec, unequal_shapes
from samebit.weight_sync.transfer_plan import Holding, Parcel, make_plan
from samebit.weight_sync.transports.base import Transport, WeightSink
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.peers import DataPlane, Parts, Round, Watch
from samebit.weight_sync.types import ParamMeta, WeightSyncError, WeightVersion

BUCKET_BYTES = 512 << 20


class _Member:
    """One rank of the group: its part of the plan, and what it says and hears."""

    def __init__(
        self,
        group: WeightGroup,
        data: DataPlane,
        specs: Sequence[ParamSpec],
        params: Mapping[str, Tensor],
        sends: bool,
        bucket_bytes: int = 0,
    ) -> None:
        """bucket_bytes: rank 0's counts."""
        self.group, self.data = group, data
        own = (sends, data.name, bucket_bytes, Holding.of(specs, params).to_plain())
        members = group.exchange(own)
        planes = sorted({name for _, name, _, _ in members})
        if len(planes) > 1:
            raise WeightSyncError(f"the ranks would move bytes by different ways: {planes}")
        holdings = [Holding.of_plain(holding) for *_, holding in members]
        self.num_senders = sum(sends for sends, *_ in members)
        roles = [sends for sends, *_ in members]
        if roles != sorted(roles, reverse=True) or not 0 < self.num_senders < len(roles):
            raise WeightSyncError("the first ranks of a weight group send, and the others receive")
        senders, receivers = holdings[: self.num_senders], holdings[self.num_senders :]
        self.plan = make_plan(senders, receivers, members[0][2])
        ends = {self._ends(parcel) for parcels in self.plan.rounds for parcel in parcels}
        outgoing = sorted(there for here, there in ends if here == group.rank)
        incoming = sorted(here for here, there in ends if there == group.rank)
        data.connect(group, outgoing, incoming, self.plan.round_bytes)
        self._coming: Future[dict[str, Any]] | None = None

    def _ends(self, parcel: Parcel) -> tuple[int, int]:
        return parcel.sender, self.num_senders + parcel.receiver

    def parts_of(self, view: Callable[[ParamMeta], Tensor]) -> list[Round]:
        """This rank's part of every round, over the memory that `view` gives for a region."""
        rank, rounds = self.group.rank, []
        for parcels in self.plan.rounds:
            outgoing, incoming = [], []
            for parcel in parcels:
                sender, receiver = self._ends(parcel)
                if rank == sender:
                    metas = tuple(t.source for t in parcel.transfers)
                    views = tuple(map(view, metas))
                    outgoing.append(Parts(receiver, metas, views, parcel.num_bytes))
                elif rank == receiver:
                    metas = tuple(t.target for t in parcel.transfers)
                    views = tuple(map(view, metas))
                    incoming.append(Parts(sender, metas, views, parcel.num_bytes))
            rounds.append(Round(tuple(outgoing), tuple(incoming)))
        return rounds

    def own_targets(self) -> list[ParamMeta]:
        """The regions that this rank receives, in the plan's order."""
        receiver = self.group.rank - self.num_senders
        return [t.target for t in self.plan.transfers if t.receiver == receiver]

    def say(self, **message: Any) -> None:
        """Rank 0 tells it; the others of its side hear the same, or raise WeightSyncError."""
        if self.group.rank == 0:
            self.group.tell(message)
        elif (heard := self.hear()) != message:
            raise WeightSyncError(f"rank {self.group.rank} would say {message}, rank 0 {heard}")

    def hear(self) -> dict[str, Any]:
        """Rank 0's next message."""
        coming, self._coming = self._coming, None
        return self.group.hear() if coming is None else coming.result()

    def refusals(self, own: str = "") -> str:
        """Exchange answers; who refused and why, "" for nobody."""
        answers = self.group.exchange(own)
        return "; ".join(f"rank {i}: {why}" for i, why in enumerate(answers) if why)

    def move(self, rounds: Sequence[Round], watch: Watch) -> None:
        """This rank's part of all rounds. Where the data plane cannot see that rank 0 is gone, the
        next message is awaited meanwhile: it never comes, or says so."""
        if self.group.rank and not self.data.sees_deaths:
            self._coming = coming = beside(self.group.hear)
            watch = lambda: _require_going_on(coming)  # noqa: E731
        self.data.move(rounds, watch)


def _require_going_on(coming: Future[dict[str, Any]]) -> None:
    if coming.done() and (message := coming.result())["op"] == "abort":
        raise WeightSyncError(message["reason"])


class ShardSender(Transport):
    """A trainer rank's end. One update at a time: a second one is refused. All trainer ranks call
    alike.

    seconds: what begin, transfer and commit of the last update took.
    """

    def __init__(
        self,
        group: WeightGroup,
        data: DataPlane,
        specs: Sequence[ParamSpec],
        params: Mapping[str, Tensor],
        bucket_bytes: int = BUCKET_BYTES,
        watch: Watch = lambda: None,
    ) -> None:
        """watch: raises if the receivers are known to be gone; asked while bytes are awaited."""
        self._specs = list(specs)
        self._member = _Member(group, data, specs, params, sends=True, bucket_bytes=bucket_bytes)
        self._watch = watch
        self._step: int | None = None
        """Of the update that is under way."""
        self.seconds: dict[str, float] = {}

    def require_closed(self, step: int) -> None:
        """Raise WeightSyncError if an update is under way."""
        if self._step is not None:
            raise WeightSyncError(f"update to step {step} begun during that to step {self._step}")

    def begin(self, step: int) -> None:
        self.require_closed(step)
        with self._timed("begin"):
            self._member.say(op="begin", step=step, plan=self._member.plan.digest)
            self._require(self._member.refusals())
            self._step = step

    def send(self, params: Mapping[str, Tensor]) -> None:
        with self._timed("transfer"):
            rounds, failure = list[Round](), None
            try:
                self._require_fitting(params)
                rounds = self._member.parts_of(lambda meta: _source(meta, params))
            except Exception as error:  # noqa: BLE001 - the others are told first: none will send
                failure = error
            self._member.say(op="send")
            refusals = self._member.refusals(repr_of(failure))
            if failure is not None:
                self._step = None
                raise failure
            self._require(refusals)
            self._member.move(rounds, self._watch)

    def commit(self, digest: str) -> WeightVersion:
        step, self._step = self._step, None
        if step is None:
            raise WeightSyncError("no update is under way")
        with self._timed("commit"):
            self._member.say(op="commit", digest=digest)
            self._require(self._member.refusals())
        return WeightVersion(step, digest)

    def abort(self, reason: str) -> None:
        """Have receivers refuse to serve until a full update. Without one under way: nothing."""
        if self._step is not None:
            self._step = None
            self._member.say(op="abort", reason=reason)

    def close(self) -> None:
        self._member.data.close()

    def _require(self, refusals: str) -> None:
        if refusals:
            self._step = None
            raise WeightSyncError(refusals)

    def _require_fitting(self, params: Mapping[str, Tensor]) -> None:
        for name, (found, wanted) in unequal_shapes(self._specs, params).items():
            if found is None:
                raise WeightSyncError(f"{name} is missing; it must be {wanted}")
            what = "unknown tensor" if wanted is None else f"{wanted} is wanted, not {found}, of"
            raise WeightSyncError(f"{what} {name}")

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def _source(meta: ParamMeta, params: Mapping[str, Tensor]) -> Tensor:
    param = params[meta.name].detach()
    region = meta.region_of(param)
    if region is None:
        raise WeightSyncError(f"{meta.name} is {param.dtype}; it must be {meta.dtype}")
    return region


class ShardReceiver:
    """An engine rank's end."""

    def __init__(
        self,
        group: WeightGroup,
        data: DataPlane,
        specs: Sequence[ParamSpec],
        params: Mapping[str, Tensor],
    ) -> None:
        self._member = _Member(group, data, specs, params, sends=False)

    def receive(self, sink: WeightSink) -> None:
        """Take one update, from begin to commit or abort.

        What the sink refuses it answers, and raises at the end. If rank 0 dies or is silent, the
        sink's update is aborted and WeightSyncError is raised; so it is by any other error.
        """
        asked = _Asked()
        try:
            self._take(sink, asked)
        except BaseException as error:
            asked(sink.abort, repr_of(error))
            raise
        if asked.refusal is not None:
            raise asked.refusal

    def _take(self, sink: WeightSink, asked: "_Asked") -> None:
        member, message = self._member, self._member.hear()
        if message["plan"] != member.plan.digest:
            asked.refuse(f"the plan is {member.plan.digest} here and {message['plan']} at rank 0")
        asked(sink.begin, message["step"])
        if member.refusals(asked.words):  # of anybody: nothing was written
            asked(sink.cancel)
            return
        message = member.hear()
        if message["op"] == "send":
            targets = member.own_targets()
            memory = asked(sink.expect, targets) or []
            if refusals := member.refusals(asked.words):
                asked(sink.abort, refusals)
                return
            of = dict(zip(map(_place, targets), memory, strict=True))
            member.move(member.parts_of(lambda meta: of[_place(meta)]), lambda: None)
            asked(sink.arrived, targets)
            message = member.hear()
        if message["op"] == "abort":
            asked(sink.abort, message["reason"])
            return
        asked.at_last(sink.commit, message["digest"])
        member.refusals(asked.words)

    def close(self) -> None:
        """Let go of what the data plane holds."""
        self._member.data.close()


def _place(meta: ParamMeta) -> tuple[str, tuple[int, ...] | None]:
    return meta.name, meta.start


class _Asked:
    """Asks a sink until it refuses; from then on its refusal stands."""

    def __init__(self) -> None:
        self.refusal: WeightSyncError | None = None

    @property
    def words(self) -> str:
        """What to answer."""
        return "" if self.refusal is None else str(self.refusal)

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

    def refuse(self, reason: str) -> None:
        """Refuse before the sink is asked."""
        self.refusal = WeightSyncError(reason)


def repr_of(error: BaseException | None) -> str:
    """What to say of an error: never "", which stands for none."""
    return "" if error is None else str(error) or repr(error)


def beside[T](call: Callable[[], T]) -> Future[T]:
    """Make a call on a thread, which does not keep the process from ending."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised to whoever asks for the result
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
