"""An update from trainer ranks to engine ranks, shard to shard, by a plan that is made once.

Rank 0 leads: it tells begin, send, and commit or abort, and after each of them but abort every rank
answers to all. So no byte moves before all ranks have said that they know the same plan and are
ready, a refusal carries its reason to every rank, and nobody waits for one that has refused.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
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

View = Callable[[ParamMeta], Tensor]
"""Gives the memory of a region."""


@dataclass(frozen=True)
class Held:
    """Parameters of this process that a rank sends or receives."""

    specs: Sequence[ParamSpec]
    params: Mapping[str, Tensor]

    def to_plain(self) -> list[Any]:
        """What the other ranks are told of them."""
        return Holding.of(self.specs, self.params).to_plain()


class _Member:
    """One rank of the group: its part of the plan, and what it says and hears."""

    def __init__(
        self,
        group: WeightGroup,
        data: DataPlane,
        sends: Held | None,
        receives: Held | None,
        bucket_bytes: int = 0,
    ) -> None:
        """bucket_bytes: rank 0's counts."""
        self.group, self.data = group, data
        held = [None if h is None else h.to_plain() for h in (sends, receives)]
        members = group.exchange((data.name, bucket_bytes, *held))
        planes = sorted({name for name, *_ in members})
        if len(planes) > 1:
            raise WeightSyncError(f"the ranks would move bytes by different ways: {planes}")
        roles = [
            {i: Holding.of_plain(member[role]) for i, member in enumerate(members) if member[role]}
            for role in (2, 3)
        ]
        if 0 not in roles[0] or not roles[1]:
            raise WeightSyncError("rank 0 of a weight group sends, and somebody has to receive")
        self._senders, self._receivers = map(list, roles)
        senders, receivers = (list(role.values()) for role in roles)
        self.plan = make_plan(senders, receivers, members[0][1])
        ends = {self._ends(parcel) for parcels in self.plan.rounds for parcel in parcels}
        outgoing = sorted(there for here, there in ends if here == group.rank != there)
        incoming = sorted(here for here, there in ends if there == group.rank != here)
        data.connect(group, outgoing, incoming, self.plan.round_bytes)
        self._coming: Future[dict[str, Any]] | None = None

    def _ends(self, parcel: Parcel) -> tuple[int, int]:
        """The ranks that send and receive it."""
        return self._senders[parcel.sender], self._receivers[parcel.receiver]

    def parts_of(self, source: View, target: View) -> list[Round]:
        """This rank's part of every round, over the memory that is given for each region."""
        rank, rounds = self.group.rank, []
        for parcels in self.plan.rounds:
            outgoing, incoming, own = [], [], []
            for parcel in parcels:
                sender, receiver = self._ends(parcel)
                if rank == sender == receiver:
                    own += [(source(t.source), target(t.target)) for t in parcel.transfers]
                elif rank == sender:
                    metas = tuple(t.source for t in parcel.transfers)
                    views = tuple(map(source, metas))
                    outgoing.append(Parts(receiver, metas, views, parcel.num_bytes))
                elif rank == receiver:
                    metas = tuple(t.target for t in parcel.transfers)
                    views = tuple(map(target, metas))
                    incoming.append(Parts(sender, metas, views, parcel.num_bytes))
            rounds.append(Round(tuple(outgoing), tuple(incoming), tuple(own)))
        return rounds

    def own_targets(self) -> list[ParamMeta]:
        """The regions that this rank receives, in the plan's order."""
        rank = self.group.rank
        return [t.target for t in self.plan.transfers if self._receivers[t.receiver] == rank]

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
    alike; a rank may have an engine rank in its process, which then takes part in the same calls.

    seconds: what begin, transfer and commit of the last update took.
    """

    def __init__(
        self,
        group: WeightGroup,
        data: DataPlane,
        sends: Held,
        bucket_bytes: int = BUCKET_BYTES,
        watch: Watch = lambda: None,
        engine: tuple[WeightSink, Held] | None = None,
    ) -> None:
        """watch: raises if the receivers are known to be gone; asked while bytes are awaited.

        engine: this process's, and what it receives.
        """
        sink, receives = engine or (None, None)
        self._specs = list(sends.specs)
        self._member = _Member(group, data, sends, receives, bucket_bytes)
        self._engine = _Engine(sink, self._member)
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
            self._engine.start()
            self._member.say(op="begin", step=step, plan=self._member.plan.digest)
            self._engine.begin(step)
            if refusals := self._engine.refusals():
                self._engine.cancel()
                raise WeightSyncError(refusals)
            self._step = step

    def send(self, params: Mapping[str, Tensor]) -> None:
        with self._timed("transfer"):
            failure: Exception | None = None
            try:
                self._require_fitting(params)
                target = self._engine.targets()
                rounds = self._member.parts_of(lambda meta: _source(meta, params), target)
            except Exception as error:  # noqa: BLE001 - the others are told first: none will send
                failure = error
            self._member.say(op="send")
            if refusals := self._engine.refusals(repr_of(failure)):
                self._step = None
                self._engine.abort(refusals)
                raise failure or WeightSyncError(refusals)
            self._member.move(rounds, self._watch)
            self._engine.arrived()

    def commit(self, digest: str) -> WeightVersion:
        step, self._step = self._step, None
        if step is None:
            raise WeightSyncError("no update is under way")
        with self._timed("commit"):
            self._member.say(op="commit", digest=digest)
            self._engine.commit(digest)
            if refusals := self._engine.refusals():
                raise WeightSyncError(refusals)
        return WeightVersion(step, digest)

    def abort(self, reason: str) -> None:
        """Have receivers refuse to serve until a full update. Without one under way: nothing."""
        if self._step is not None:
            self._step = None
            self._engine.abort(reason)
            self._member.say(op="abort", reason=reason)

    def close(self) -> None:
        self._member.data.close()

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
    """An engine rank's end, in a process of its own."""

    def __init__(self, group: WeightGroup, data: DataPlane, receives: Held) -> None:
        self._member = _Member(group, data, None, receives)

    def receive(self, sink: WeightSink) -> None:
        """Take one update, from begin to commit or abort.

        What the sink refuses it answers, and raises at the end. If rank 0 dies or is silent, the
        sink's update is aborted and WeightSyncError is raised; so it is by any other error.
        """
        engine = _Engine(sink, self._member)
        try:
            self._take(engine)
        except BaseException as error:
            engine.abort(repr_of(error))
            raise
        if engine.refusal is not None:
            raise engine.refusal

    def _take(self, engine: "_Engine") -> None:
        member, message = self._member, self._member.hear()
        if message["plan"] != member.plan.digest:
            engine.refuse(f"the plan is {member.plan.digest} here and {message['plan']} at rank 0")
        engine.begin(message["step"])
        if engine.refusals():
            engine.cancel()  # whoever refused: nothing was written
            return
        message = member.hear()
        if message["op"] == "send":
            target = engine.targets()
            if refusals := engine.refusals():
                engine.abort(refusals)
                return
            member.move(member.parts_of(_sends_nothing, target), lambda: None)
            engine.arrived()
            message = member.hear()
        if message["op"] == "abort":
            engine.abort(message["reason"])
            return
        engine.commit(message["digest"])
        engine.refusals()

    def close(self) -> None:
        """Let go of what the data plane holds."""
        self._member.data.close()


def _sends_nothing(meta: ParamMeta) -> Tensor:
    raise AssertionError(meta)


class _Engine:
    """The engine of a rank, if it has one: asked until it refuses; then its refusal stands."""

    def __init__(self, sink: WeightSink | None, member: _Member) -> None:
        self._sink, self._member = sink, member
        self.refusal: WeightSyncError | None = None

    def start(self) -> None:
        """Forget the last update's refusal."""
        self.refusal = None

    def refuse(self, reason: str) -> None:
        """Refuse before the engine is asked."""
        self.refusal = WeightSyncError(reason)

    def refusals(self, own: str = "") -> str:
        """Exchange answers; who refused and why, "" for nobody."""
        return self._member.refusals(own or ("" if self.refusal is None else str(self.refusal)))

    def begin(self, step: int) -> None:
        if self._sink is not None:
            self._ask(self._sink.begin, step)

    def cancel(self) -> None:
        if self._sink is not None:
            self._ask(self._sink.cancel)

    def targets(self) -> View:
        """The memory of the regions that come, by region."""
        if self._sink is None:
            return _receives_nothing
        metas = self._member.own_targets()
        views = self._ask(self._sink.expect, metas) or []
        of = dict(zip(map(_place, metas), views, strict=False))
        return lambda meta: of[_place(meta)]

    def arrived(self) -> None:
        if self._sink is not None:
            self._ask(self._sink.arrived, self._member.own_targets())

    def commit(self, digest: str) -> None:
        """In any case: tensor parallel ranks learn there what others refused."""
        if self._sink is not None:
            try:
                self._sink.commit(digest)
            except WeightSyncError as error:
                self.refusal = self.refusal or error

    def abort(self, reason: str) -> None:
        if self._sink is not None:
            self._ask(self._sink.abort, reason)

    def _ask[T, *A](self, action: Callable[[*A], T], *args: *A) -> T | None:
        if self.refusal is None:
            try:
                return action(*args)
            except WeightSyncError as error:
                self.refusal = error
        return None


def _receives_nothing(meta: ParamMeta) -> Tensor:
    raise AssertionError(meta)


def _place(meta: ParamMeta) -> tuple[str, tuple[int, ...] | None]:
    return meta.name, meta.start


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
