"""gloo, nccl, ipc: from a trainer's processes to engines in other processes, shard to shard.

gloo goes over sockets and the host's memory; nccl from GPU to GPU; ipc through buckets of a GPU
that both processes use. The engines are called to take part while this process sends.
"""

import logging
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from samebit.weight_sync.meeting import LOOPBACK, is_loopback, listener_at
from samebit.weight_sync.transports.base import Transport, WeightSource
from samebit.weight_sync.transports.data_planes import make_data_plane
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.shards import BUCKET_BYTES, Held, ShardSender, beside
from samebit.weight_sync.transports.trainer_ranks import ALONE, TrainerRanks
from samebit.weight_sync.types import LostMemberError, WeightSyncError, WeightVersion

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 60
"""Seconds at most that an engine is given to say why its group is broken."""


class RemoteTransport(Transport):
    """To an engine in another process, or to all `replicas` of one, as they are at an update's
    begin. After a break-off, and where a replica has a successor, the next update makes a new
    group."""

    backend: ClassVar[str]
    """The data plane."""
    bucket_bytes: ClassVar[int] = BUCKET_BYTES
    """What travels at a time, unless another number is given."""

    def __init__(
        self,
        source: WeightSource,
        engine: Any,
        timeout_s: float = 600.0,
        bucket_bytes: int | None = None,
        delta: bool = False,
        trainers: TrainerRanks = ALONE,
    ) -> None:
        """Meet an engine that has join_weight_transport and receive_weight_update, or replicas that
        have. Of several trainers the first has the engine, the others None; all call alike.

        timeout_s: how long each waits for the other. delta: send only what has changed since the
        last update where the engine holds that (see ShardSender). Raises what either end does.
        """
        self._source, self._engine, self._trainers = source, engine, trainers
        self._address = trainers.address()
        self._timeout_s, self._bucket_bytes = timeout_s, bucket_bytes or self.bucket_bytes
        self._last_words_s = min(timeout_s, _LAST_WORDS_S)
        self._delta = delta
        self._members: tuple[Any, ...] = ()
        self._receiving: list[Future[Any]] = []
        self._sender: ShardSender | None = None
        self._sender = self._insisting(self._meet)

    @classmethod
    def between(
        cls,
        source: WeightSource,
        engine: Any,
        folder: Path,
        delta: bool = False,
        timeout_s: float = 600.0,
    ) -> Self:
        return cls(source, engine, timeout_s, delta=delta, trainers=TrainerRanks.of_world())

    @property
    def seconds(self) -> dict[str, float]:
        """What begin, transfer and commit of the last update took."""
        return {} if self._sender is None else self._sender.seconds

    @property
    def sent_bytes(self) -> int:
        """What the last update sent."""
        return 0 if self._sender is None else self._sender.sent_bytes

    def update(self, params: Mapping[str, Tensor], digest: str) -> WeightVersion:
        """See Transport.update. Where a replica dies in it, or stands still and is killed, it is
        made again with its successor."""
        return self._insisting(partial(super().update, params, digest))

    def begin(self, step: int) -> None:
        if self._sender is not None:
            self._sender.require_closed(step)
        changed = self._trainers.told(self._has_changed)
        sender = self._sender
        if self._trainers.any(changed or sender is None) or sender is None:
            self._drop()
            self._sender = sender = self._meet()
        self._receiving = [beside(member.receive_weight_update) for member in self._members]
        with self._exchanging(sender):
            sender.begin(step)

    def send(self, params: Mapping[str, Tensor]) -> None:
        with self._exchanging(sender := self._open()):
            sender.send(params)

    def commit(self, digest: str) -> WeightVersion:
        """Return once the engine serves the new version; raise its own error if it refused."""
        with self._exchanging(sender := self._open()):
            version = sender.commit(digest)
        self._answer()
        return version

    def abort(self, reason: str) -> None:
        if self._sender is not None and self._sender.is_open:
            with self._exchanging(self._sender):
                self._sender.abort(reason)
            self._answer()

    def close(self) -> None:
        if self._sender is not None:
            self._drop()
            for leaving in [beside(member.leave_weight_transport) for member in self._members]:
                with suppress(RuntimeError, TimeoutError):  # dead or frozen: nothing is to be had
                    leaving.result(self._last_words_s)

    def _insisting[T](self, call: Callable[[], T]) -> T:
        """What a call gives that all trainers make, again where a replica was lost in it."""
        while True:
            try:
                return self._trainers.agreed(call)
            except Exception:
                if not self._trainers.told(self._has_lost):
                    raise

    def _has_lost(self) -> bool:
        """Whether an engine is not there any more of those that have met."""
        there = _members(self._engine)
        return any(member not in there for member in self._members)

    def _has_changed(self) -> bool:
        """Whether there are other engines than those that have met."""
        return _members(self._engine) != self._members

    def _drop(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _open(self) -> ShardSender:
        if self._sender is None:
            raise WeightSyncError("no update is under way")
        return self._sender

    def _meet(self) -> ShardSender:
        """Both ends at once; port and secret are this one's before the engine is told them.

        Whichever fails first is the one to tell: the other would wait for it in vain.
        """
        params, trainers = self._source.params, self._trainers
        data = make_data_plane(self.backend, next(iter(params.values())).device)
        listeners: list[socket.socket] = []
        address, port, secret, size = trainers.told(partial(self._listen, listeners))
        known = self._timeout_s, secret

        def require_coming() -> None:
            for each in joining:
                if each.done():
                    each.result()

        def make_sender() -> ShardSender:
            with ExitStack() as stack:
                listener = next(map(stack.enter_context, listeners), None)
                place = address, port, trainers.rank, size
                try:
                    group = WeightGroup(*place, *known, listener, require_coming)
                except ValueError as error:  # somebody has not come
                    raise (error if trainers == ALONE else LostMemberError(str(error))) from error
                sends = Held(self._source.specs, params)
                more = self._bucket_bytes, self._require_receiving
                try:
                    return ShardSender(group, data, sends, *more, delta=self._delta)
                except BaseException:
                    group.close()  # the engines, which may wait for this end, hear of it
                    raise

        self._receiving = joining = [
            beside(
                partial(member.join_weight_transport, address, port, i, size, self.backend, *known)
            )
            for i, member in self._places()
        ]
        made = beside(make_sender)
        wait([*joining, made], return_when=FIRST_EXCEPTION)
        if any(each.done() and each.exception() is not None for each in (*joining, made)):
            wait([made], self._last_words_s)  # its thread ends with it
            if made.done():  # it holds nobody up
                not_come = isinstance(made.exception(), LostMemberError | ValueError)
                self._hear_out(is_silent=not_come)
            require_coming()
        return made.result()

    def _listen(self, listeners: list[socket.socket]) -> tuple[str, int, str, int]:
        """Where all ranks meet, by which secret, and how many they are: the first trainer's to say,
        which listens there."""
        self._members = _members(self._engine)
        reached = [getattr(member, "address", LOOPBACK) for member in self._members]
        there = [address for address in (self._address, *reached) if not is_loopback(address)]
        listeners.append(listener_at(there[0] if there else LOOPBACK))
        address, port = listeners[0].getsockname()[:2]
        size = self._trainers.size + sum(map(_num_ranks, self._members))
        return address, port, secrets.token_hex(32), size

    def _places(self) -> Iterator[tuple[int, Any]]:
        """The engines, each with the rank of its first process, behind the trainers."""
        rank = self._trainers.size
        for member in self._members:
            yield rank, member
            rank += _num_ranks(member)

    def _answer(self) -> None:
        """Raise what ended the engine's part of an update that has ended here."""
        try:
            for each in self._receiving:
                each.result(self._timeout_s)
        except TimeoutError:
            self._drop()
            self._hear_out(is_silent=True)
            raise WeightSyncError(f"the engine said nothing for {self._timeout_s:g} s") from None

    def _require_receiving(self) -> None:
        for each in self._receiving:
            if each.done():
                each.result()
                raise WeightSyncError("the engine has ended the update")

    @contextmanager
    def _exchanging(self, sender: ShardSender) -> Iterator[None]:
        """Let go of a group that has come out of step, which wakes the engine's end, and raise the
        engine's own error in place of what this end sees of it: it says more."""
        try:
            yield
        except BaseException as error:
            if not sender.in_order:
                self._drop()
            if isinstance(error, WeightSyncError):
                said = self._hear_out(isinstance(error, LostMemberError))
                # Who is the cause says more than those who only see that it is gone.
                said.sort(key=lambda other: isinstance(other, LostMemberError))
                for other in filter(None, said):
                    raise other from error
            raise

    def _hear_out(self, is_silent: bool) -> list[BaseException | None]:
        """What the engines say that has ended their part, those that do not stand still.

        is_silent: somebody has not been heard of. Replicas leave a group that this end has let go
        of: then one that does not, with all its ranks, is killed; it is replaced.
        """
        parts, leaving = self._receiving, list[Future[Any]]()
        has_replicas = hasattr(type(self._engine), "replicas")  # which would wait for successors
        if is_silent and self._sender is None and has_replicas:
            leaving = [beside(member.leave_weight_transport) for member in self._members]
        silent = wait([*parts, *leaving], self._last_words_s).not_done
        for member, left in zip(self._members, leaving, strict=bool(leaving)):
            if left in silent:
                logger.warning("a replica stands still in an update: it is killed")
                member.kill()
        if leaving:
            wait(silent, self._last_words_s)  # until it can be seen that they are dead
        return [each.exception() for each in parts if each.done()]


def _members(engine: Any) -> tuple[Any, ...]:
    """Those that take part in an update: an engine, or all of its replicas. None has none."""
    return () if engine is None else getattr(engine, "replicas", (engine,))


def _num_ranks(member: Any) -> int:
    """How many processes of the weight group an engine is: its tensor parallel ranks."""
    return getattr(member, "num_ranks", 1)


class GlooTransport(RemoteTransport):
    """Over sockets; for tests, and for engines on the CPU or on other machines."""

    backend = "gloo"


class NcclTransport(RemoteTransport):
    """From this process's GPU to another one."""

    backend = "nccl"


class IpcTransport(RemoteTransport):
    """To an engine on this process's GPU. Two processes take turns on it: fewer are faster."""

    backend = "ipc"
    bucket_bytes = 2 * BUCKET_BYTES
