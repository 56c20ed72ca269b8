"""What a run's configuration asks of a launcher, and what a launcher has told this process."""

import os
import sys
import threading
from typing import Any, NoReturn

from samebit.recipes.config import ConfigError

CRASHED = os.EX_SOFTWARE
"""The exit code of one of a launcher's processes after an error that starting again may mend."""
FOLLOWS = "SAMEBIT_FOLLOWS_STDIN"
"""Of the environment: the process is to end when its standard input closes."""
RAY_PLACES = "SAMEBIT_RAY_PLACES"
"""Of the environment: the process is in a place of a Ray cluster, and where the others are."""


def num_processes(run: Any) -> int:
    """Return the number of processes that a run's configuration asks for."""
    return getattr(run, "num_processes", 1)


def max_restarts(run: Any) -> int:
    """Return how often a run's processes may be started again."""
    return getattr(run, "max_restarts", 0)


def launcher_of(run: Any) -> str:
    """Return who is to start the run's processes: local, the command itself, or ray."""
    return getattr(run, "launcher", "local")


def is_launched() -> bool:
    """Say whether this process is one of several that a launcher has started."""
    return "RANK" in os.environ


def is_on_ray() -> bool:
    """Say whether Ray has given this process its place."""
    return RAY_PLACES in os.environ


def needs_launch(run: Any) -> bool:
    """Say whether the run's processes are still to be started."""
    is_started = is_launched() or FOLLOWS in os.environ
    several = num_processes(run) > 1 or max_restarts(run) > 0 or launcher_of(run) == "ray"
    return several and not is_started and not getattr(run, "dry_run", False)


def launched_rank() -> int:
    """Return this process's place among those that a launcher has started; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def processes_here(run: Any) -> int:
    """Return how many of the run's processes are on this machine, as far as a launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes(run)))


def is_one_of_several() -> bool:
    """Say whether other processes run beside this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(code: int) -> NoReturn:
    """End one of several processes at once, after an error.

    Python's own way out would take the process groups down in order, which waits for the others,
    who wait for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def follow_launcher(run: Any) -> bool:
    """End when our launcher does: then its end of the standard input closes.

    Returns whether there is one. Raises ConfigError if another is to restart the run.
    """
    follows = os.environ.pop(FOLLOWS, None) is not None
    if follows:
        threading.Thread(target=_until_closed, daemon=True).start()
    elif is_launched() and max_restarts(run) > 0:
        raise ConfigError(
            f"max_restarts is {run.max_restarts}; it must be 0 where RANK is set: the launcher "
            "that set it starts processes again, with resume=true in their command"
        )
    return follows


def _until_closed() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)
