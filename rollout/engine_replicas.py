"""EngineReplicas: the engines of a pool, those that live and those that are being started.

One that dies, or that is waited for and silent for too long, which has it killed, is replaced at
once, so often as may be.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial

from samebit.rollout.remote import RemoteEngine
from samebit.rollout.remote_ranks import RemoteEngineError
from samebit.rollout.work_queue import WorkQueue
from samebit.weight_sync.transports.shards import beside

logger = logging.getLogger(__name__)

_FROZEN_S = 10.0  # many beats of an engine that draws


class EngineReplicas:
    """Engines by their places; any thread may call it. Close it when done."""

    def __init__(
        self,
        launch: Callable[[int], RemoteEngine],
        num_replicas: int,
        queue: WorkQueue[RemoteEngine],
        timeout_s: float,
        max_restarts: int,
        start_timeout_s: float,
    ) -> None:
        """queue: what they draw; the dead are taken out of it. Else as EnginePool's."""
        self._launch, self._queue, self._max_restarts = launch, queue, max_restarts
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self.lock = threading.Lock()
        """Of the queue, too."""
        self.num_restarts = 0
        """How many replicas have died so far."""
        self._last_death: RemoteEngineError | None = None
        self._asked: list[tuple[RemoteEngine, float]] = []  # who may be silent for how long
        self._is_closed = threading.Event()
        self._engines: dict[int, RemoteEngine] = {}  # by place, those that live
        self._starting: dict[int, Future[RemoteEngine]] = {
            place: beside(partial(self._start, place)) for place in range(num_replicas)
        }
        threading.Thread(target=self._watch, name="samebit replicas", daemon=True).start()

    # -- who there is ----------------------------------------------------------------------------

    @property
    def living(self) -> tuple[RemoteEngine, ...]:
        """Those that draw."""
        for engine in self._known():
            if not engine.is_alive:
                self.bury(engine, engine.death())
        return self._known()

    def all_started(self) -> tuple[RemoteEngine, ...]:
        """Those that live, with the successors of the dead, which are waited for.

        One that dies as it starts has a successor too. Raises what else the start of one raised, or
        RemoteEngineError if more have died than may.
        """
        _ = self.living  # the dead among them have successors from here on
        while waiting := sorted(self._starting.items()):
            for place, starting in waiting:
                self._take_in(place, starting)
        if self.num_restarts > self._max_restarts:
            raise self.exhausted()
        return self._known()

    def admit(self) -> None:
        """Have those that live take what is queued. Holds the lock."""
        for engine in self._engines.values():
            self._queue.add(engine)

    def bury(self, engine: RemoteEngine, death: RemoteEngineError) -> None:
        """Take a dead replica out, whose jobs wait again, and begin to start its successor."""
        with self.lock:
            self._queue.remove(engine)
            place = next((p for p, e in self._engines.items() if e is engine), None)
            if place is None:
                return  # somebody else has seen it
            del self._engines[place]
            if not self._is_closed.is_set():
                self._replace(place, death)

    def exhausted(self) -> RemoteEngineError:
        """What to say where none is left, or more have died than may."""
        if self._is_closed.is_set():
            return RemoteEngineError("the engine is closed")
        left = "none is left to draw" if self.num_restarts <= self._max_restarts else (
            f"at most {self._max_restarts} may be replaced"
        )  # fmt: skip
        count = self.num_restarts
        who, have = ("1 replica", "has") if count == 1 else (f"{count} replicas", "have")
        return RemoteEngineError(
            f"{who} of the engine {have} died, and {left}; the last death: {self._last_death}"
        )

    def close(self) -> None:
        """End all processes, and with them what is unfinished."""
        self._is_closed.set()
        with self.lock:
            engines, starting = [*self._engines.values()], [*self._starting.values()]
            frozen = [engine for engine in self._busy() if engine.silent_s > _FROZEN_S]
            for engine in (*frozen, *(engine for engine, _ in self._asked)):
                engine.kill()  # it heeds no Stop, or nobody waits for its start or answer
        engines += [future.result() for future in starting if not future.exception()]
        for engine in engines:
            engine.close()

    # -- what they are asked ---------------------------------------------------------------------

    def ask[T](
        self,
        engine: RemoteEngine,
        question: Callable[[RemoteEngine], T],
        timeout_s: float | None = None,
    ) -> T:
        """A replica's answer. One that dies of it is replaced, and raises RemoteEngineError.

        timeout_s: how long it may be silent, where that is not as long as in a draw.
        """
        try:
            with self._waiting_for(engine, timeout_s or self._timeout_s):
                return question(engine)
        except RemoteEngineError as error:
            self.bury(engine, error)
            raise

    def ask_each[T](
        self,
        engines: Sequence[RemoteEngine],
        question: Callable[[RemoteEngine], T],
        timeout_s: float | None = None,
    ) -> list[T]:
        """The answers of those that do not die of it."""
        answers = []
        for engine in engines:
            with suppress(RemoteEngineError):
                answers.append(self.ask(engine, question, timeout_s))
        return answers

    def ask_first[T](self, question: Callable[[RemoteEngine], T]) -> T:
        """The answer of the first one that lives; where none does, of one that is being started,
        which draws nothing yet. RemoteEngineError if there is none."""
        while living := self.living:
            with suppress(RemoteEngineError):
                return self.ask(living[0], question)
        for starting in [*self._starting.values()]:
            with suppress(RemoteEngineError):
                return self.ask(starting.result(), question)
        raise self.exhausted()

    def ask_started[T](self, question: Callable[[RemoteEngine], T]) -> list[T]:
        """The answers of all that have started, of one at least; it may take them as long as a
        start. Raises what `all_started` does, and RemoteEngineError where all die of it twice."""
        for _ in range(2):
            if answers := self.ask_each(self.all_started(), question, self._start_timeout_s):
                return answers
        raise RemoteEngineError(
            f"all replicas of the engine have died of what they were asked, twice; the last death: "
            f"{self._last_death}"
        )

    @contextmanager
    def _waiting_for(self, engine: RemoteEngine, timeout_s: float) -> Iterator[None]:
        """Within it the engine is killed once it was silent for so long."""
        asked = engine, timeout_s
        with self.lock:
            self._asked.append(asked)
        try:
            yield
        finally:
            with self.lock:
                self._asked.remove(asked)

    def _busy(self) -> list[RemoteEngine]:
        """Those that draw something. Holds the lock."""
        return [engine for engine in self._queue.replicas if self._queue.is_busy(engine)]

    def _watch(self) -> None:
        """Kill who is waited for and silent: what waits for it then learns that it is dead."""
        while not self._is_closed.wait(min(1.0, self._timeout_s / 4)):
            with self.lock:
                busy = ((engine, self._timeout_s) for engine in self._busy())
                waited_for = [*busy, *self._asked]
            for engine, timeout_s in waited_for:
                if (silent_s := engine.silent_s) > timeout_s:
                    logger.warning("a replica took no step for %.0f s: it is killed", silent_s)
                    engine.kill()

    # -- how they come and go --------------------------------------------------------------------

    def _start(self, place: int) -> RemoteEngine:
        """The replica of a place once it has started; RemoteEngineError if it takes too long."""
        engine = self._launch(place)
        with self._waiting_for(engine, self._start_timeout_s):
            if self._is_closed.is_set():
                engine.kill()
            engine.wait_started()
        return engine

    def _take_in(self, place: int, starting: Future[RemoteEngine]) -> None:
        """Have a replica take part once it has started, or replace it."""
        wait([starting])
        death = starting.exception()
        with self.lock:
            if self._starting.get(place) is not starting:
                return  # somebody else has seen it
            if isinstance(death, RemoteEngineError) and not self._is_closed.is_set():
                del self._starting[place]
                self._replace(place, death)
                return
            engine = starting.result()
            del self._starting[place]
            self._engines[place] = engine

    def _known(self) -> tuple[RemoteEngine, ...]:
        with self.lock:
            return tuple(engine for _, engine in sorted(self._engines.items()))

    def _replace(self, place: int, death: RemoteEngineError) -> None:
        """Count a death, and begin to start the successor if it may have one. Holds the lock."""
        self.num_restarts += 1
        self._last_death = death
        restarts = self.num_restarts <= self._max_restarts
        if restarts:
            self._starting[place] = beside(partial(self._start, place))
        logger.warning(
            "%s, which was replica %d%s", death, place, "; it is replaced" if restarts else ""
        )
