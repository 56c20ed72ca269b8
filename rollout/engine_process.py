"""The process of a RemoteEngine: it has an engine do what messages ask, and answers them."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from samebit.rollout.engine import Engine
from samebit.rollout.messages import (
    Abandon,
    Answer,
    Ask,
    Beat,
    Done,
    Draw,
    Drew,
    Failed,
    Generate,
    Message,
    Score,
    Stop,
)
from samebit.rollout.runtime.call import Call
from samebit.rollout.types import Completion, Increment

_BEAT_S = 1.0
START = 0
"""The number of what is of no call: whether the engine could be made, and its beats."""


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
        server.engine = engine = Engine(model_path, **settings)
    except Exception as error:  # noqa: BLE001 - every error goes to the caller
        server.send(START, Failed(_portable(error)))
        return
    server.send(START, Done(None))
    threading.Thread(target=server.beat, args=(cpu_threads,), daemon=True).start()
    with suppress(EOFError, OSError):  # the caller is gone
        while True:
            number, message = connection.recv()
            if isinstance(message, Stop):
                break
            server.handle(number, message)
    engine.close()


def _follow_parent() -> None:
    """Also in the midst of a rollout, which nobody waits for any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Server:
    """Has an engine do what messages ask. Its loop's thread answers calls that take steps."""

    engine: Engine

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._calls: dict[int, Call] = {}

    def handle(self, number: int, message: Message) -> None:
        engine = self.engine
        try:
            match message:
                case Generate(prompts, params, ids, layers, fresh_ids, streams):
                    requests = engine.requests.generation(prompts, params, ids, layers, fresh_ids)
                    tell = partial(self._tell, number) if streams else None
                    self._submit(number, Call(requests, tell))
                case Draw(requests):
                    self._submit(number, Call(requests))
                case Score(token_ids, temperature, k):
                    requests = engine.requests.scoring(token_ids, temperature, k)
                    self._submit(number, Call(requests))
                case Abandon(caller):
                    if (call := self._calls.get(caller)) is not None:
                        engine.loop.abandon(call).result()
                    self.send(number, Done(None))
                case Ask(function, arguments, by_name):
                    # Between steps: the loop's thread must admit nothing while weights change.
                    asked = partial(function, engine, *arguments, **by_name)
                    self.send(number, Done(engine.loop.between_steps(asked)))
        except Exception as error:  # noqa: BLE001 - as above
            self.send(number, Failed(_portable(error)))

    def beat(self, cpu_threads: int) -> None:
        """Say again and again that the engine goes on from step to step, or has nothing to do."""
        torch.set_num_threads(cpu_threads)  # as all threads that may hand the steps on to another
        while True:
            self.engine.loop.between_steps(lambda: None)
            self.send(START, Beat())
            time.sleep(_BEAT_S)

    def send(self, number: int, answer: Answer) -> None:
        with self._sending, suppress(OSError):  # the caller is gone, and this process soon
            self._connection.send((number, answer))

    def _submit(self, number: int, call: Call) -> None:
        def finish(result: Future[list[list[Completion]]]) -> None:
            del self._calls[number]
            try:
                self.send(number, Done(result.result()))
            except BaseException as error:  # noqa: BLE001 - as above
                self.send(number, Failed(_portable(error)))

        self._calls[number] = call
        call.result.add_done_callback(finish)
        self.engine.loop.submit(call)

    def _tell(self, number: int, increments: list[Increment]) -> None:
        self.send(number, Drew(increments))


def _portable(error: BaseException) -> BaseException:
    """A copy that says where it was raised; of another type if its own cannot be sent."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever the type does when it is copied
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in the engine's process:\n{''.join(traceback.format_exception(error))}")
    return copy
