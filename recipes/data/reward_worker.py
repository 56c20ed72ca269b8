"""The process that runs a reward's foreign code: the user's function, math-verify, reasoning_gym.

It reads pickled commands from its parent (an 8-byte length before each), and answers every item of
a command, in order, with one line of JSON, which can carry nothing that runs in the parent. An item
is one call's: a sample, or lists of some. Calls of an `async def` run at the same time, in the loop
of this process; which of them ends first is not to be seen. It imports no torch. Signals that a
terminal or a job scheduler sends to everybody leave it alone; it ends when its parent does.
"""

import asyncio
import ctypes
import json
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from samebit.recipes.data.rewards import BoundReward, bind_reward, finite

LENGTH_BYTES = 8
CONCURRENCY = 32
"""Calls of an `async def` at the same time, unless reward.concurrency says another number."""
_PR_SET_PDEATHSIG = 1

Item = tuple[Any, ...]
Reply = list[Any]


def main(commands_fd: int, results_fd: int, parent: int) -> None:
    """Serve the commands until their pipe closes: `load` once, then `check` and `score`."""
    _follow(parent)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    own = os.getpid()

    def answer(reply: Reply) -> None:
        if os.getpid() != own:  # a copy that the reward forked has come back here
            os._exit(0)
        _write(results_fd, (json.dumps(reply) + "\n").encode("ascii"))

    loaded = _Loaded()
    with os.fdopen(commands_fd, "rb") as commands:
        for kind, items in _commands(commands):
            if kind == "score" and loaded.reward.is_async:
                loaded.score_at_once(items, answer)
                continue
            for item in items:
                answer(_call(loaded.functions[kind], item))
    os._exit(0)  # whatever threads a reward has left


class _Loaded:
    """The reward, once it is there, and how its answers to commands are made."""

    reward: BoundReward

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Reply]] = {
            "load": self._load,
            "check": self._check,
            "score": lambda *item: _reply(self.reward(*item), item, batched=self._batched),
        }
        self._runner = asyncio.Runner()

    def score_at_once(self, items: Sequence[Item], answer: Callable[[Reply], None]) -> None:
        """Await the calls of all items, some at a time; the answers come in the items' order."""
        self._runner.run(self._answers(items, answer))

    def _load(
        self,
        name: str,
        args: dict[str, Any],
        key: str,
        batched: bool,
        concurrency: int | None,
        timeout_s: float,
    ) -> Reply:
        reward = bind_reward(name, args, key, batched=batched)
        if concurrency is not None and not reward.is_async:
            raise ValueError(
                f"{key}.concurrency is {concurrency}, but {name!r} is no `async def`, so that a "
                f"process makes one call at a time; leave it unset, and give {key}.num_workers"
            )
        self.reward, self._batched, self._timeout_s = reward, batched, timeout_s
        self._concurrency = concurrency or CONCURRENCY
        return ["loaded", reward.has_check, reward.is_async]

    def _check(self, problem: Any) -> Reply:
        self.reward.check_problem(problem)
        return ["ok", None]

    async def _answers(self, items: Sequence[Item], answer: Callable[[Reply], None]) -> None:
        places = asyncio.Semaphore(self._concurrency)  # it is fair: calls begin in order

        async def call(item: Item) -> Reply:
            async with places:
                return await self._awaited(item)

        for task in [asyncio.create_task(call(item)) for item in items]:
            answer(await task)

    async def _awaited(self, item: Item) -> Reply:
        timer = asyncio.timeout(self._timeout_s)
        try:
            async with timer:
                found = await self.reward(*item)
            return _reply(found, item, batched=self._batched)
        except BaseException as error:  # noqa: BLE001 (as in _call)
            return ["late"] if timer.expired() else _raised(error)


def _follow(parent: int) -> None:
    """Die with the parent; let SIGINT and SIGTERM pass, which decide nothing here."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    own = os.getpid()

    def handle(number: int, _frame: Any) -> None:
        if os.getpid() != own:  # a process that the reward forked
            os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))


def _commands(file: IO[bytes]) -> Iterator[tuple[str, list[Item]]]:
    while length := file.read(LENGTH_BYTES):
        yield pickle.loads(file.read(int.from_bytes(length)))


def _call(function: Callable[..., Reply], item: Item) -> Reply:
    try:
        return function(*item)
    except BaseException as error:  # noqa: BLE001 (the parent raises it; SystemExit too)
        return _raised(error)


def _raised(error: BaseException) -> Reply:
    if os.environ.get("SAMEBIT_TRACEBACK"):
        traceback.print_exception(error)
    return ["raised", type(error).__name__, _text(error)]


def _reply(found: Any, item: Item, *, batched: bool) -> Reply:
    """["ok", number or numbers], or ["returned", what is wrong with it, which sample or null]."""
    if not batched:
        number = finite(found)
        return ["returned", _unfit(found), None] if number is None else ["ok", number]
    found = found.tolist() if hasattr(found, "tolist") else found
    count = len(item[0])
    if not isinstance(found, Sequence) or isinstance(found, str | bytes | Mapping):
        what = f"returned {found!r:.80}; return a list of {count} numbers, one for each, in order"
        return ["returned", what, None]
    if len(found) != count:
        what = f"returned {len(found)} rewards; return {count}, one for each, in order"
        return ["returned", what, None]
    numbers = [finite(value) for value in found]
    if None in numbers:
        place = numbers.index(None)
        return ["returned", _unfit(found[place]), place]
    return ["ok", numbers]


def _unfit(value: Any) -> str:
    return f"returned {value!r:.80}; return a finite number"


def _text(error: BaseException) -> str:
    """What it says, in one line, cut short; its own code may raise as well."""
    try:
        return " ".join(f"{error}".split())[:2000]
    except BaseException as again:  # noqa: BLE001
        return f"its text cannot be made, {type(again).__name__}"


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
