"""Which lines of the code this process executes, by sys.monitoring: one event for each line."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("kernels", "rollout", "weight_sync", "trainer", "recipes")
VARIABLE = "SAMEBIT_REACHED_LINES"
"""Names the folder in which child processes note their lines, a file for each process."""

_TOOL = sys.monitoring.COVERAGE_ID


def watch(note: Callable[[str, int], None]) -> None:
    """Call note(file, line) when a line of the code is executed, once until `watch_again`."""
    prefixes = {f"{ROOT}/{folder}/": len(str(ROOT)) + 1 for folder in CODE_FOLDERS}
    known: dict[str, str] = {}

    def executed(code: CodeType, line: int) -> Any:
        path = code.co_filename
        name = known.get(path)
        if name is None:
            real = os.path.realpath(path)
            start = next((n for prefix, n in prefixes.items() if real.startswith(prefix)), None)
            name = known[path] = "" if start is None else real[start:]
        if name:
            note(name, line)
        return sys.monitoring.DISABLE

    sys.monitoring.use_tool_id(_TOOL, "samebit")
    sys.monitoring.register_callback(_TOOL, sys.monitoring.events.LINE, executed)
    sys.monitoring.set_events(_TOOL, sys.monitoring.events.LINE)


def watch_again() -> None:
    """From now on every line is noted once more."""
    sys.monitoring.restart_events()


def watch_child() -> None:
    """In a child process of a test: append its lines to a file of its own, where asked for.

    Written at once: a child may be killed at any moment.
    """
    folder = os.environ.get(VARIABLE)
    if folder:

        def note(name: str, line: int) -> None:
            own = f"{folder}/{os.getpid()}"  # another one after a fork
            with suppress(OSError), open(own, "a") as file:  # a test may forbid its child to write
                file.write(f"{name}:{line}\n")

        watch(note)
