"""The process that runs a reward's foreign code: the user's function, math-verify, reasoning_gym.

It reads pickled commands from its parent (an 8-byte length before each), and answers every item of
a command with one line of JSON, which can carry nothing that runs in the parent. It imports no
torch. Signals that a terminal or a job scheduler sends to everybody leave it alone; it ends when
its parent does.
"""

import ctypes
import json
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any

from samebit.recipes.data.rewards import bind_reward, finite

LENGTH_BYTES = 8
_PR_SET_PDEATHSIG = 1


def main(commands_fd: int, results_fd: int, parent: int) -> None:
    """Serve the commands until their pipe closes: `load` once, then `check` and `score`."""
    _follow(parent)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    own = os.getpid()
    functions: dict[str, Callable[..., Any]] = {}

    def load(name: str, args: dict[str, Any]) -> bool:
        reward = bind_reward(name, args)
        functions.update(check=reward.check_problem, score=reward)
        return reward.has_check

    functions["load"] = load
    with os.fdopen(commands_fd, "rb") as commands:
        for kind, items in _commands(commands):
            for item in items:
                reply = _call(functions[kind], item, returns=kind != "check")
                if os.getpid() != own:  # a copy that the reward forked has come back here
                    os._exit(0)
                _write(results_fd, (json.dumps(reply) + "\n").encode("ascii"))
    os._exit(0)  # whatever threads a reward has left


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


def _commands(file: IO[bytes]) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    while length := file.read(LENGTH_BYTES):
        yield pickle.loads(file.read(int.from_bytes(length)))


def _call(function: Callable[..., Any], item: tuple[Any, ...], *, returns: bool) -> list[Any]:
    """["ok", number or null], ["returned", what it returned instead] or ["raised", type, text]."""
    try:
        found = function(*item)
        if not returns:
            return ["ok", None]
        number = finite(found)
        return ["returned", f"{found!r:.80}"] if number is None else ["ok", number]
    except BaseException as error:  # noqa: BLE001 (the parent raises it; SystemExit too)
        if os.environ.get("SAMEBIT_TRACEBACK"):
            traceback.print_exc()
        return ["raised", type(error).__name__, _text(error)]


def _text(error: BaseException) -> str:
    """What it says, in one line, cut short; its own code may raise as well."""
    try:
        return " ".join(f"{error}".split())[:2000]
    except BaseException as again:  # noqa: BLE001
        return f"its text cannot be made, {type(again).__name__}"


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
