"""An engine in a process of its own on this machine, called like one in this process."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch

from samebit.rollout.types import Completion, SamplingParams
from samebit.weight_sync.types import WeightVersion


class RemoteEngineError(RuntimeError):
    """The engine's process died."""


def _serve(connection: Connection, model_path: str, cpu_threads: int, settings: dict) -> None:
    """The child's loop: call the engine's methods by name until told to stop.

    It ends when its parent does, and only then: signals to a whole group are the parent's to judge.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(cpu_threads)
    from samebit.rollout.engine import Engine

    engine: Any = None
    while True:
        try:
            name, args, kwargs = connection.recv()
        except EOFError:
            return  # the parent is gone
        try:
            if name == "start":
                engine = Engine(model_path, **settings)
                result = engine.weight_version
            elif name == "weight_version":
                result = engine.weight_version
            else:
                result = getattr(engine, name)(*args, **kwargs)
            connection.send((True, result))
        except Exception as error:  # noqa: BLE001 - every error goes to the caller
            error.add_note(f"in the engine's process:\n{traceback.format_exc()}")
            connection.send((False, error))


def _follow_parent() -> None:
    """Also in the midst of a rollout, which nobody waits for any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class RemoteEngine:
    """Starts a process with an Engine; arguments as Engine's. Close it when done."""

    def __init__(self, model_path: str | Path, cpu_threads: int = 1, **settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, str(model_path), cpu_threads, settings), daemon=True
        )
        self._process.start()
        Finalize(self, self._process.kill, exitpriority=1)  # for those who do not close it
        child.close()
        self._call("start")

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
        progress: Any = None,
    ) -> list[list[Completion]]:
        """See Engine.generate; progress knows of no tokens before the end.

        If it raises, the engine's process is ended: nobody waits for its answer.
        """
        self._send(
            "generate",
            prompt_ids,
            sampling_params,
            sample_ids,
            return_hidden_states=return_hidden_states,
        )
        if progress is not None:
            self._wait(progress)
        groups = self._receive()
        if progress is not None:
            done = [c for group in groups for c in group]
            progress(len(done), sum(len(c.token_ids) for c in done))
        return groups

    def score(
        self, token_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """See Engine.score."""
        return self._call("score", token_ids, temperature)

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the weights that are served."""
        return self._call("weight_version")

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """See Engine.update_weights_from_disk."""
        return self._call("update_weights_from_disk", str(model_path), step)

    def init_weights_update_group(self, *args: Any, **kwargs: Any) -> None:
        """See Engine.init_weights_update_group."""
        self._call("init_weights_update_group", *args, **kwargs)

    def update_weights_from_distributed(self) -> WeightVersion:
        """See Engine.update_weights_from_distributed."""
        return self._call("update_weights_from_distributed")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()

    def _wait(self, progress: Any) -> None:
        """For the engine's answer, calling progress now and then."""
        try:
            while not self._connection.poll(0.1):
                progress(0, 0)
        except BaseException:
            self._process.kill()
            raise

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self._send(name, *args, **kwargs)
        return self._receive()

    def _send(self, name: str, *args: Any, **kwargs: Any) -> None:
        try:
            self._connection.send((name, args, kwargs))
        except (BrokenPipeError, OSError) as error:
            raise self._died() from error

    def _receive(self) -> Any:
        try:
            succeeded, result = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error
        except BaseException:
            self._process.kill()  # else its answer would be taken for the next call's
            raise
        if not succeeded:
            raise result
        return result

    def _died(self) -> RemoteEngineError:
        self._process.join(timeout=5)
        return RemoteEngineError(
            f"the engine's process {self._process.pid} ended with code {self._process.exitcode}"
        )
