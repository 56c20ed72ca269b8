"""A process of a RemoteEngine: it has an engine do what messages ask, and answers them.

Of several tensor parallel ranks the first is asked to draw and leads; the others follow.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from samebit.kernels.reduce import ALONE, RankGroup
from samebit.rollout.device import resolve_device
from samebit.rollout.engine import Engine
from samebit.rollout.messages import (
    Abandon,
    Answer,
    Ask,
    Beat,
    Done,
    Draw,
    Drew,
    Ended,
    Failed,
    Generate,
    LeaveOff,
    Meet,
    Message,
    Score,
    Stop,
)
from samebit.rollout.runtime.call import Call
from samebit.rollout.types import Completion, Increment, Request
from samebit.weight_sync.meeting import gloo_on_loopback, prove_secret

logger = logging.getLogger(__name__)

_TIMEOUT = timedelta(hours=4)
"""That ranks wait for each other: one may load or receive weights for long. Who dies is seen."""
_BEAT_S = 1.0
_TOLD_EVERY_S = 0.25
_UNTOLD_S = 60.0
"""How long what a step raised on one rank may wait to be told to the others."""
PARTED = os.EX_SOFTWARE
"""The exit code of a rank that has lost the others, or they it."""
START = 0
"""The number of what is of no call: whether the engine could be made, its beats, what has ended."""


def serve_parent(
    connection: Connection, model_path: str, cpu_threads: int, settings: dict[str, Any]
) -> None:
    """What a child process does: serve, and end when its parent does, and only then: signals to a
    whole group are the parent's to judge."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    serve(connection, model_path, cpu_threads, settings)


def serve(
    connection: Connection, model_path: str, cpu_threads: int, settings: dict[str, Any]
) -> None:
    """Make an engine, and handle messages until it is told to stop, or nobody is there to tell."""
    torch.set_num_threads(cpu_threads)
    device = settings.get("device")
    if device is not None and (gpu := torch.device(device)).index is not None:
        torch.cuda.set_device(gpu)
    server = _Server(connection)
    try:
        _, place = connection.recv()
        server.rank = place.rank
        ranks = _join(place, device, settings.get("ranks", ALONE))
        server.engine = engine = Engine(model_path, **settings | {"ranks": ranks})
    except Exception as error:  # noqa: BLE001 - every error goes to the caller
        server.send(START, Failed(_portable(error)))
        return
    server.send(START, Done(None))
    if place.size > 1:
        threading.Thread(target=server.watch, daemon=True).start()
    if place.rank > 0:
        threading.Thread(target=server.hear, daemon=True).start()
        server.follow()
    else:
        threading.Thread(target=server.beat, args=(cpu_threads,), daemon=True).start()
        threading.Thread(target=server.endings.run, daemon=True).start()
        with suppress(EOFError, OSError), engine.leading():  # until the caller is gone
            while True:
                number, message = connection.recv()
                if isinstance(message, Stop):
                    break
                server.handle(number, message)
    engine.close()


def _join(place: Meet, device: Any, alone: RankGroup) -> RankGroup:
    """This process among its engine's ranks, all of which are on this machine.

    Raises ValueError if one of them does not come, or does not know the secret.
    """
    if place.size == 1:
        return alone
    store = dist.TCPStore(place.address, place.port, timeout=_TIMEOUT)
    prove_secret(store, place.rank, place.size, place.secret)
    on_gpu = resolve_device(device).type == "cuda"
    with gloo_on_loopback():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=_TIMEOUT,
        )
    return replace(alone, rank=place.rank, size=place.size, group=dist.group.WORLD)


def _follow_parent() -> None:
    """Also in the midst of a rollout, which nobody waits for any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Endings:
    """Tells of samples that have ended while others of their call go on: by a thread of its own, of
    the first at once, of those that come soon after together."""

    def __init__(self, send: Callable[[int, Answer], object]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._untold: dict[int, int] = {}
        self._came = threading.Event()

    def add(self, number: int, num_samples: int) -> None:
        """So many more of the call of this number."""
        with self._lock:
            self._untold[number] = self._untold.get(number, 0) + num_samples
        self._came.set()

    def forget(self, number: int) -> None:
        """The call is about to be answered."""
        with self._lock:
            self._untold.pop(number, None)

    def tell(self) -> None:
        """Tell what is untold."""
        with self._lock:
            untold, self._untold = self._untold, {}
        if untold:
            self._send(START, Ended(untold))

    def run(self) -> None:
        """Tell what comes, without end."""
        while self._came.wait():
            self._came.clear()
            self.tell()
            time.sleep(_TOLD_EVERY_S)


class _Server:
    """Has an engine do what messages ask. Its loop's thread answers calls that take steps."""

    engine: Engine

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._calls: dict[int, Call] = {}
        self._heard: SimpleQueue[tuple[int, Message] | None] = SimpleQueue()
        self.endings = Endings(self.send)
        self.rank = 0

    def handle(self, number: int, message: Message) -> None:
        engine = self.engine
        try:
            match message:
                case Generate(prompts, params, ids, layers, fresh_ids, streams):
                    requests = engine.requests.generation(prompts, params, ids, layers, fresh_ids)
                    tell = partial(self._tell, number) if streams else None
                    self._submit(number, Call(requests, tell))
                case Draw(requests):
                    for each, of_call in requests.items():
                        self._draw(each, of_call)
                case Score(token_ids, temperature, k):
                    requests = engine.requests.scoring(token_ids, temperature, k)
                    self._submit(number, Call(requests))
                case Abandon(caller):
                    if (call := self._calls.get(caller)) is not None:
                        engine.loop.abandon(call).result()
                    self.send(number, Done(None))
                case LeaveOff(numbers):
                    calls = [self._calls.get(each) for each in numbers]
                    engine.loop.leave_off([c for c in calls if c is not None]).result()
                    self.send(number, Done(None))
                case Ask(function, arguments, by_name):
                    # Between steps: the loop's thread must admit nothing while weights change.
                    asked = partial(function, engine, *arguments, **by_name)
                    asked = partial(engine.loop.book.ask, number, asked)
                    found = engine.loop.between_steps(asked)
                    self.send(number, Done(None if self.rank else found))
        except Exception as error:  # noqa: BLE001 - as above
            if isinstance(message, Ask):
                engine.loop.between_steps(self._require_together)
            self.send(number, Failed(_portable(error)))

    def follow(self) -> None:
        """Do what rank 0 does, until it stops; this process ends if it is gone."""
        try:
            self.engine.loop.follow(self._take_asked)
        except Exception as error:  # noqa: BLE001 - whatever parts the ranks
            _part(error)

    def hear(self) -> None:
        """Take in what this rank is asked, long before it is its turn: whoever asks would wait."""
        with suppress(EOFError, OSError):  # the caller is gone
            while True:
                self._heard.put(self._connection.recv())
        self._heard.put(None)

    def watch(self) -> None:
        """End this process if the others do not come to hear what a step raised here: they wait in
        it for this rank, on a GPU without end."""
        lockstep = self.engine.loop.book.lockstep
        while lockstep.untold_s < _UNTOLD_S:
            time.sleep(_BEAT_S)
        _part(RuntimeError("a step failed here, and the other ranks do not come out of it"))

    def beat(self, cpu_threads: int) -> None:
        """Say again and again that the engine goes on from step to step, or has nothing to do; on
        all ranks."""
        torch.set_num_threads(cpu_threads)  # as all threads that may hand the steps on to another
        while True:
            self.engine.loop.between_steps(self._require_together)
            self.send(START, Beat())
            time.sleep(_BEAT_S)

    def send(self, number: int, answer: Answer) -> None:
        # Plainly: who reads has not to come back for a tensor's memory.
        packed = pickle.dumps((number, answer))
        with self._sending, suppress(OSError):  # the caller is gone, and this process soon
            self._connection.send_bytes(packed)

    def _draw(self, number: int, requests: Sequence[Request]) -> None:
        """Begin a call of requests whose sender may take this engine for a larger one."""
        try:
            for request in requests:
                self.engine.requests.require_room(request, "a request to an engine's process")
        except ValueError as error:
            self.send(number, Failed(_portable(error)))
            return
        call = Call(requests, ended=partial(self.endings.add, number))
        self._submit(number, call, lambda groups: [c for group in groups for c in group])

    def _submit(self, number: int, call: Call, of: Callable[[Any], Any] = lambda x: x) -> None:
        """Have a call's requests drawn, and answer it with what `of` makes of their groups."""

        def finish(result: Future[list[list[Completion]]]) -> None:
            if self._calls.pop(number, None) is None:
                return  # it was answered
            self.endings.forget(number)
            try:
                self.send(number, Done(of(result.result())))
            except BaseException as error:  # noqa: BLE001 - as above
                self._require_together()
                self.send(number, Failed(_portable(error)))

        self._calls[number] = call
        call.result.add_done_callback(finish)
        try:
            self.engine.loop.submit(call)
        except Exception as error:  # noqa: BLE001 - as above
            if self._calls.pop(number, None) is not None:
                self.send(number, Failed(_portable(error)))

    def _take_asked(self, number: int) -> None:
        """Do what this rank, too, was asked by a number. What is before it was given up as it went
        out: rank 0 was not asked."""
        while (asked := self._heard.get()) is not None:
            if asked[0] == number:
                self.handle(*asked)
                return
        raise EOFError("whoever asks is gone")

    def _require_together(self) -> None:
        """End this process if the ranks have parted: what a step raised on one alone is no answer,
        and the engine is of no use."""
        lockstep = self.engine.loop.book.lockstep
        try:
            lockstep.meet()
            if lockstep.untold_s:  # of a drain, which the others hear of in between
                lockstep.meet()
        except Exception as error:  # noqa: BLE001 - as in follow
            _part(error)

    def _tell(self, number: int, increments: list[Increment]) -> None:
        self.send(number, Drew(increments))


def _part(error: Exception) -> NoReturn:
    """End a rank without the others, which would be waited for on any other way out."""
    logger.error("a tensor parallel rank of the engine ends: %s", error)
    os._exit(PARTED)


def _portable(error: BaseException) -> BaseException:
    """A copy that says where it was raised; of another type if its own cannot be sent."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever the type does when it is copied
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in the engine's process:\n{''.join(traceback.format_exception(error))}")
    return copy
