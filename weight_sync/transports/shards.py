"""An update from trainer ranks to engine ranks, shard to shard, by a plan that is made once.

Rank 0 leads: it tells begin, send, and commit or abort, and after each of them but abort every rank
answers to all. So no byte moves before all ranks have said that they know the same plan and are
ready, a refusal carries its reason to every rank, and nobody waits for one that has refused.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

from torch import Tensor

from samebit.weight_sync.mapping import ParamSpec, unequal_shapes
from samebit.weight_sync.transfer_plan import Holding, Parcel, make_plan
from samebit.weight_sync.transports.asked_sink import AskedSink
from samebit.weight_sync.transports.base import Transport, WeightSink
from samebit.weight_sync.transports.delta import Base, Counts, only_changes
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.peers import DataPlane, Parts, Round, View, Watch
from samebit.weight_sync.types import (
    LostMemberError,
    ParamMeta,
    WeightSyncError,
    WeightVersion,
)

BUCKET_BYTES = 512 << 20


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
        group.exchange("connected")  # nobody goes on, or away, while another still connects
        self.is_delta = False
        """Whether all receivers hold what all senders know they hold: only changes travel."""

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

    def sent_params(self) -> set[str]:
        """Names of the parameters that this rank sends to others."""
        ends = ((*self._ends(p), p) for parcels in self.plan.rounds for p in parcels)
        rank = self.group.rank
        parcels = [parcel for here, there, parcel in ends if here == rank != there]
        return {t.source.name for parcel in parcels for t in parcel.transfers}

    def close(self) -> None:
        """Let go of sockets and buffers."""
        self.data.close()
        self.group.close()

    def say(self, **message: Any) -> None:
        """Rank 0 tells it; the others of its side hear the same, or raise WeightSyncError."""
        if self.group.rank == 0:
            self.group.tell(message)
        elif (heard := self.group.hear()) != message:
            raise WeightSyncError(f"rank {self.group.rank} would say {message}, rank 0 {heard}")

    def answers(self, own: str, more: Any = None) -> tuple[str, list[Any]]:
        """Exchange refusals: who refused and why, "" for nobody; and what else each rank said."""
        refusals, others = zip(*self.group.exchange((own, more)), strict=True)
        return "; ".join(f"rank {i}: {why}" for i, why in enumerate(refusals) if why), list(others)

    def agree(self, engine: AskedSink, *known: str) -> str:
        """The refusals to begin; and see alike on all ranks whether a delta will do.

        known: the digest of what this rank knows that the receivers hold, "" for nothing.
        """
        refusals, told = self.answers(engine.words, [*known, *engine.held])
        digests = {digest for rank in told for digest in rank}
        self.is_delta = len(digests) == 1 and "" not in digests
        return refusals

    def move(self, rounds: Iterable[Round], watch: Watch) -> None:
        """This rank's part of all rounds. What a data plane does not see, that another rank has
        failed or is gone, is asked of the group meanwhile, and told it."""

        def watch_all() -> None:
            watch()
            self.group.require_going_on()

        try:
            self.data.move(rounds, watch if self.data.sees_deaths else watch_all)
        except BaseException as error:
            self.group.give_up(repr_of(error))
            raise


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
        delta: bool = False,
    ) -> None:
        """watch: raises if the receivers are known to be gone; asked while bytes are awaited.

        engine: this process's, and what it receives. delta: keep what was sent, as large as it is,
        and where all receivers hold it send only the elements that have changed.
        """
        sink, receives = engine or (None, None)
        self._specs = list(sends.specs)
        self._member = _Member(group, data, sends, receives, bucket_bytes)
        self._engine = AskedSink(sink, self._member.own_targets())
        self._delta = delta
        sent = self._member.sent_params() if delta else ()
        self._base = Base({name: sends.params[name] for name in sent})
        self._watch = watch
        self.in_order = True
        """Whether all ranks know alike how far the update is: whatever else is raised than a
        refusal leaves a group that is of no use any more."""
        self._step: int | None = None
        """Of the update that is under way."""
        self.seconds: dict[str, float] = {}
        self.sent_bytes = 0
        """Of the last update, to other ranks."""

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
            if refusals := self._member.agree(self._engine, self._base.digest):
                self._engine.cancel()
                self.in_order = True
                raise WeightSyncError(refusals)
            self._step = step

    def send(self, params: Mapping[str, Tensor]) -> None:
        with self._timed("transfer"):
            failure: Exception | None = None
            base, counts = self._base, Counts()
            try:
                self._require_fitting(params)
                target = self._engine.targets()
                rounds = self._member.parts_of(lambda meta: _source(meta, params), target)
                if self._member.is_delta:
                    counts = base.count_changes(rounds)
            except Exception as error:  # noqa: BLE001 - the others are told first: none will send
                failure = error
            self._member.say(op="send")
            own = repr_of(failure) or self._engine.words
            refusals, told = self._member.answers(own, counts)
            if refusals:
                self._step, self.in_order = None, True
                self._engine.abort(refusals)
                raise failure or WeightSyncError(refusals)
            going: Iterable[Round] = rounds
            if self._member.is_delta:
                going = only_changes(rounds, self._member.group.rank, told, base.region)
            base.digest, self.sent_bytes = "", 0
            self._member.move(self._counted(going), self._watch)
            base.keep(params)
            self._engine.arrived()

    def commit(self, digest: str) -> WeightVersion:
        step, self._step = self._step, None
        if step is None:
            raise WeightSyncError("no update is under way")
        with self._timed("commit"):
            self._member.say(op="commit", digest=digest)
            self._engine.commit(digest)
            refusals, _ = self._member.answers(self._engine.words)
            if refusals:
                self.in_order = True
                raise WeightSyncError(refusals)
        self._base.digest = digest if self._delta else ""
        return WeightVersion(step, digest)

    def abort(self, reason: str) -> None:
        """Have receivers refuse to serve until a full update. Without one under way: nothing."""
        if self._step is not None:
            self._step = None
            with self._timed("abort"):
                self._engine.abort(reason)
                with suppress(LostMemberError):  # who has failed, or seen it, has let go
                    self._member.say(op="abort", reason=reason)

    @property
    def is_open(self) -> bool:
        """Whether an update is under way."""
        return self._step is not None

    def close(self) -> None:
        self._member.close()
        self._base = Base({})

    def _counted(self, rounds: Iterable[Round]) -> Iterator[Round]:
        for round_ in rounds:
            self.sent_bytes += sum(v.nbytes for parts in round_.outgoing for v in parts.views)
            yield round_

    def _require_fitting(self, params: Mapping[str, Tensor]) -> None:
        for name, (found, wanted) in unequal_shapes(self._specs, params).items():
            if found is None:
                raise WeightSyncError(f"{name} is missing; it must be {wanted}")
            what = "unknown tensor" if wanted is None else f"{wanted} is wanted, not {found}, of"
            raise WeightSyncError(f"{what} {name}")

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start, self.in_order = time.perf_counter(), False
        yield
        self.seconds[stage], self.in_order = time.perf_counter() - start, True


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
        self._is_closed = False

    def receive(self, sink: WeightSink) -> None:
        """Take one update, from begin to commit or abort.

        What the sink refuses it answers, and raises at the end. If rank 0 dies or is silent, the
        sink's update is aborted and WeightSyncError is raised; so it is by any other error.
        """
        if self._is_closed:
            raise WeightSyncError("the weight group is broken; call join_weight_transport again")
        engine = AskedSink(sink, self._member.own_targets())
        try:
            self._take(engine)
        except BaseException as error:
            engine.abort(repr_of(error))
            self.close()  # the other ranks would wait for this one
            raise
        if engine.refusal is not None:
            raise engine.refusal

    def _take(self, engine: AskedSink) -> None:
        member, message = self._member, self._member.group.hear()
        if message["op"] != "begin":
            raise WeightSyncError(f"rank 0 says {message['op']} and has not begun")
        if message["plan"] != member.plan.digest:
            engine.refuse(f"the plan is {member.plan.digest} here and {message['plan']} at rank 0")
        engine.begin(message["step"])
        if member.agree(engine):
            engine.cancel()  # whoever refused: nothing was written
            return
        message = member.group.hear()
        if message["op"] == "send":
            target = engine.targets()
            refusals, told = member.answers(engine.words, {})
            if refusals:
                engine.abort(refusals)
                return
            rounds: Iterable[Round] = member.parts_of(_sends_nothing, target)
            if member.is_delta:
                rounds = only_changes(rounds, member.group.rank, told, _sends_nothing)
            member.move(rounds, lambda: None)
            engine.arrived()
            message = member.group.hear()
        if message["op"] == "abort":
            engine.abort(message["reason"])
            return
        engine.commit(message["digest"])
        member.answers(engine.words)

    def close(self) -> None:
        """Let go of the group, and of what the data plane holds."""
        self._is_closed = True
        self._member.close()


def _sends_nothing(meta: ParamMeta) -> Tensor:
    raise AssertionError(meta)


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
