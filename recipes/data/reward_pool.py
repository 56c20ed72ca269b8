"""Worker processes that run a reward: bounded in number, each call in time, and killed if need be.

Calls are independent: they go to whatever worker is free, and their rewards come back in order.
A function that takes several completions at once is given neighbours, as many as the configuration
says, however many workers there are. A worker answers in JSON (see reward_worker.py), so that what
it runs cannot reach this process. What a reward keeps in its module is kept for each worker by
itself.
"""

import json
import math
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from samebit.recipes.data.reward_config import RewardConfig, RewardFunction
from samebit.recipes.data.reward_sum import RewardSum
from samebit.recipes.data.reward_worker import LENGTH_BYTES, Item, Reply
from samebit.recipes.data.rewards import (
    IN_PROCESS,
    REWARDS,
    Poll,
    RewardError,
    Scorer,
    bind_reward,
    describe,
    describe_batch,
)
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.run.signals import signal_name
from samebit.weight_sync.meeting import own_secret

START_TIMEOUT_S = 600.0  # for the import of a reward, which may read a model
MOST_WORKERS = 4
MOST_ITEMS = 64  # of one command
MOST_BYTES = 1 << 20  # of one answer
_TICK_S = 0.1
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from samebit.recipes.data.reward_worker import main; main(*map(int, sys.argv[2:]))"
)
_OURS = (signal.SIGINT, signal.SIGTERM)


class WorkerEnded(RuntimeError):
    """A worker has ended by itself, or sent something that is no answer."""


class Worker:
    """Holds one process and the items whose answers it owes, oldest first."""

    def __init__(self) -> None:
        own_secret()  # it leaves the environment, which foreign code is about to inherit
        commands, self._commands = os.pipe()
        self.results, results = os.pipe()
        os.set_blocking(self.results, False)
        path = json.dumps([str(entry) for entry in sys.path])
        numbers = (str(n) for n in (commands, results, os.getpid()))
        # A signal that comes before the process has its handlers waits until then.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, path, *numbers],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the standard output is the command's own
                pass_fds=(commands, results),
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(commands)
            os.close(results)
        self._buffer = b""
        self.owed: deque[int] = deque()
        self.deadline = 0.0
        self.kill = weakref.finalize(self, _kill, self._process, (self._commands, self.results))

    def send(self, kind: str, items: Sequence[Item], owed: Sequence[int], timeout_s: float) -> None:
        """Begin a command; a thread writes it, so that a worker that reads nothing blocks nobody.

        `timeout_s` is for each item. One command at a time: the writers of two could change places.
        """
        assert not self.owed, "the worker still owes answers"
        data = pickle.dumps((kind, list(items)))
        self.owed.extend(owed)
        self.deadline = time.monotonic() + timeout_s
        data = len(data).to_bytes(LENGTH_BYTES) + data
        threading.Thread(target=_write, args=(os.dup(self._commands), data), daemon=True).start()

    def receive(self, timeout_s: float) -> Iterator[tuple[int, Reply]]:
        """Return (item, answer) of what has come; raises WorkerEnded if the process has ended."""
        try:
            data = os.read(self.results, MOST_BYTES)
        except BlockingIOError:
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            reply = _parse(line)
            if reply is None or not self.owed:
                raise WorkerEnded("wrote to a file of ours")
            self.deadline = time.monotonic() + timeout_s
            yield self.owed.popleft(), reply
        if len(self._buffer) > MOST_BYTES:
            raise WorkerEnded("wrote to a file of ours")
        if not data:
            with suppress(subprocess.TimeoutExpired):  # it may have closed the pipe alone
                self._process.wait(1.0)
            raise WorkerEnded(_ending(self._process.poll()))


class RewardPool:
    """Runs a reward in worker processes; see `load_reward`.

    key: the section of the configuration that errors name.
    """

    def __init__(self, config: RewardFunction, poll: Poll, key: str = "reward") -> None:
        self.name = config.name
        self._key = key
        self._batch_size = config.batch_size
        batched, timeout_s = config.batch_size is not None, float(config.timeout_s)
        called = key, batched, config.concurrency, timeout_s
        self._loaded: Item = (config.name, dict(config.args), *called)
        self._timeout_s = timeout_s
        cores = len(os.sched_getaffinity(0))
        self._size = config.num_workers or min(MOST_WORKERS, cores)
        self._workers: list[Worker] = []
        self._has_check = self._is_async = False
        for _ in self._run("load", [], poll):
            pass
        if self._is_async and config.num_workers is None:
            self._size = 1

    def __call__(self, text: str, problem: Problem) -> float:
        return self.score([text], [problem], lambda: None)[0]

    def score(self, texts: Sequence[str], problems: Sequence[Problem], poll: Poll) -> list[float]:
        """Return the rewards in order; see rewards.score."""
        found: dict[int, list[float]] = {}
        items: list[Item] = list(zip(texts, problems, strict=True))
        if size := self._batch_size:
            parts = [items[start : start + size] for start in range(0, len(items), size)]
            items = [tuple(map(list, zip(*part, strict=True))) for part in parts]
        for i, (kind, *what) in self._run("score", items, poll):
            if kind != "ok":
                self.close()
                raise RewardError(self._fault(kind, what, items[i]))
            found[i] = what[0] if size else what
        return [reward for i in range(len(items)) for reward in found[i]]

    def _fault(self, kind: str, what: list[Any], item: Item) -> str:
        """What is wrong with a call's answer."""
        place = None
        if kind == "raised":
            error, text = what
            did = f"raised {error}: {text} (SAMEBIT_TRACEBACK=1 shows where)"
        elif kind == "late":
            did = self._late()
        else:
            did, place = what
        return f"{self._describe('score', item, place)} {did}"

    def check(self, problems: Sequence[Problem], poll: Poll) -> list[str]:
        """Return for each problem what the reward says is wrong with it, or an empty text."""
        faults = [""] * len(problems)
        if not self._has_check:
            return faults
        for i, (kind, *what) in self._run("check", [(p,) for p in problems], poll):
            if kind == "raised":
                error, text = what
                said = f"{error}: {text}" if text else error
                faults[i] = text if text and error == "ValueError" else said
        return faults

    def close(self) -> None:
        """End the workers. The next call starts others."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _run(self, kind: str, items: Sequence[Item], poll: Poll) -> Iterator[tuple[int, Reply]]:
        """The answer to every item, as they come. Kills the workers if it does not come to its end.

        Without items it starts one worker. Raises what a worker that cannot start raises, and
        RewardError for an item that ends a worker or takes too long.
        """
        size = min(MOST_ITEMS, len(items) // (4 * self._size))
        if self._is_async and kind == "score":  # whose calls overlap within a command
            size = -(-len(items) // self._size)
        size = max(1, size)
        starts = range(0, len(items), size)
        todo = deque(range(len(items))[start : start + size] for start in starts)
        least = -1 if kind == "load" else 0  # a worker that still starts is not waited for
        try:
            while len(self._workers) < min(self._size, len(todo) or 1):
                self._start()
            while todo or any(w.owed and w.owed[0] >= least for w in self._workers):
                for worker in self._workers:
                    if todo and not worker.owed:
                        batch = todo.popleft()
                        worker.send(kind, [items[i] for i in batch], batch, self._timeout_s)
                for worker in self._wait(poll):
                    yield from self._answers(worker, kind, items)
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        worker = Worker()
        self._workers.append(worker)
        worker.send("load", [self._loaded], [-1], START_TIMEOUT_S)

    def _wait(self, poll: Poll) -> list[Worker]:
        """Workers that have written something, or whose time is over."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if worker.owed:
                    selector.register(worker.results, selectors.EVENT_READ, worker)
            ready = [key.data for key, _ in selector.select(_TICK_S)]
        poll()
        now = time.monotonic()
        late = [w for w in self._workers if w.owed and w.deadline < now and w not in ready]
        return ready + late

    def _answers(
        self, worker: Worker, kind: str, items: Sequence[Item]
    ) -> Iterator[tuple[int, Reply]]:
        first = worker.owed[0]
        try:
            for i, reply in worker.receive(self._timeout_s):
                if i >= 0:
                    yield i, reply
                elif reply[0] == "raised":
                    raise (ImportError if reply[1] == "ImportError" else ValueError)(reply[2])
                else:
                    _, self._has_check, self._is_async = reply
        except WorkerEnded as ended:
            guilty = worker.owed[0] if worker.owed else first
            raise self._failure(kind, items, guilty, f"{ended}") from None
        if worker.owed and worker.deadline < time.monotonic():
            starts = worker.owed[0] < 0
            what = f"took longer than {START_TIMEOUT_S:g} s and was killed"
            raise self._failure(kind, items, worker.owed[0], what if starts else self._late())

    def _late(self) -> str:
        return f"took longer than {self._timeout_s:g} s ({self._key}.timeout_s) and was killed"

    def _failure(self, kind: str, items: Sequence[Item], i: int, what: str) -> Exception:
        if i < 0:
            cannot = "which cannot be imported"
            return ValueError(f"{self._key}.name is {self.name!r}, {cannot}: it {what}")
        return RewardError(f"{self._describe(kind, items[i])} {what}")

    def _describe(self, kind: str, item: Item, place: int | None = None) -> str:
        if kind == "score" and self._batch_size:
            texts, problems = item
            if place is None:
                return describe_batch(self.name, problems)
            return describe(self.name, texts[place], problems[place])
        if kind == "score":
            return describe(self.name, *item)
        return f"the reward {self.name!r}, checking {item[0].name},"


def _parse(line: bytes) -> Reply | None:
    """An answer; None for anything else."""
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    match reply:
        case ["ok", None] | ["late"] | ["loaded", bool(), bool()]:
            return reply
        case ["ok", float() as number] if math.isfinite(number):
            return reply
        case ["ok", [*numbers]] if all(isinstance(x, float) and math.isfinite(x) for x in numbers):
            return reply
        case ["returned", str(), int() | None] | ["raised", str(), str()]:
            return reply
    return None


def _ending(code: int | None) -> str:
    if code is None:
        return "closed a file of ours"
    if code >= 0:
        return f"ended its process with exit code {code}"
    return f"ended its process by {signal_name(-code)}"


def _write(fd: int, data: bytes) -> None:
    with suppress(BrokenPipeError), os.fdopen(fd, "wb") as file:  # whoever waits for it is told
        file.write(data)


def _kill(process: "subprocess.Popen[bytes]", files: tuple[int, ...]) -> None:
    """The process with all that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for fd in files:
        os.close(fd)


def load_reward(config: RewardConfig, poll: Poll = lambda: None) -> Scorer | RewardSum:
    """Return the reward that a config names.

    Ours that only compare texts run in this process. Code of others (your function, math-verify,
    reasoning_gym) is imported and run in worker processes alone, which this starts.
    Raises ValueError for an unknown name (listing the choices), a function that cannot be
    imported, or arguments that it does not take.
    """
    loaded: list[Scorer] = []
    try:
        for key, function in config.functions.items():
            loaded.append(_load_function(function, key, poll))
    except BaseException:
        for scorer in loaded:
            scorer.close()
        raise
    if not config.terms:
        return loaded[0]
    weights = [term.weight for term in config.terms]
    return RewardSum([term.metric for term in config.terms], weights, loaded)


def _load_function(config: RewardFunction, key: str, poll: Poll) -> Scorer:
    if config.name in IN_PROCESS:
        return bind_reward(config.name, config.args, key)
    if config.name not in REWARDS and not all(config.name.partition(":")):
        raise ValueError(
            f"{key}.name is {config.name!r}; give one of {', '.join(REWARDS)}, or module:function"
        )
    return RewardPool(config, poll, key)
