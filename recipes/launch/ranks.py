"""The processes of a run as their launcher sees them, and those on this machine.

Each runs the same command with its rank in the environment, which is complete before torch is
imported; one alone has no rank. If its launcher is killed, it ends.
"""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from samebit.recipes.launch.launched import FOLLOWS, num_processes
from samebit.recipes.run.folder import standing_run


class RankProcess(Protocol):
    """One of a run's processes; subprocess's are such."""

    def poll(self) -> int | None:
        """Its exit code, -n if signal n ended it; None while it runs."""

    def wait(self) -> int:
        """Wait for its end; returns its exit code, as poll does."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal, unless it has ended."""

    def kill(self) -> None:
        """End it at once; `wait` returns soon."""


class Ranks(Protocol):
    """What starts a run's processes, all of them each time."""

    def start(self, command: Sequence[str]) -> Iterator[RankProcess]:
        """Start a process for each rank, in order, with this command.

        Raises LostActorError where one is lost before it can be watched.
        """

    def standing_run(self, folder: Path) -> tuple[int, int] | None:
        """See run.folder.standing_run: of the folder as the first rank finds it."""


@dataclass
class Meeting:
    """Where several processes of a run find each other. It is there as long as this object."""

    store: Any
    environment: dict[str, str] = field(default_factory=dict)
    """What all of them are told."""
    defaults: dict[str, str] = field(default_factory=dict)
    """The same, unless the user has set it."""


def meeting_of(run: Any, address: str) -> Meeting:
    """Return a meeting at one of this machine's addresses; of a process alone, nowhere.

    The system chooses the port, and nobody can take it in between.
    """
    size, follows = num_processes(run), {FOLLOWS: "1"}
    if size == 1:
        return Meeting(None, follows)
    from samebit.trainer.megatron.setup import DETERMINISTIC
    from samebit.weight_sync.meeting import SECRET, host_store, listener_at

    store = host_store(listener_at(address))
    told = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        SECRET: secrets.token_hex(32),
    }
    threads = {"OMP_NUM_THREADS": str(getattr(run, "cpu_threads", 1))}
    return Meeting(store, follows | told, DETERMINISTIC | threads)


def place_of(rank: int, local_rank: int, local_size: int) -> dict[str, str]:
    """Return what one of several processes is told of its place on its machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    return {name: str(number) for name, number in numbers.items()}


class _LocalProcess(subprocess.Popen[bytes]):
    """A RankProcess in a process group of its own. Unless it ends well, what it has started there
    ends with it: an engine that stands still would not notice, and keep its GPU."""

    def wait(self, timeout: float | None = None) -> int:
        """See RankProcess.wait."""
        with suppress(ChildProcessError):  # somebody else has seen it
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            if ended is not None and ended.si_status != 0:
                self.kill()  # while the number is still its own
        return super().wait(timeout)

    def kill(self) -> None:
        """See RankProcess.kill."""
        if self.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class LocalRanks:
    """The Ranks whose processes are this one's children. They share its standard error; the first
    one has its standard output, too."""

    def __init__(self, run: Any) -> None:
        """Raises ValueError for more processes than GPUs, if the run is to be on them."""
        require_gpus(run, num_processes(run))
        self._run, self._meeting = run, Meeting(None)

    def start(self, command: Sequence[str]) -> Iterator[RankProcess]:
        """See Ranks.start."""
        from samebit.weight_sync.meeting import LOOPBACK

        size = num_processes(self._run)
        self._meeting = meeting = meeting_of(self._run, LOOPBACK)
        defaults, shared = meeting.defaults, meeting.environment
        for rank in range(size):
            place = place_of(rank, rank, size) if size > 1 else {}
            yield _LocalProcess(
                command,
                env=defaults | os.environ | shared | place,
                stdin=subprocess.PIPE,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                start_new_session=True,  # the terminal's Ctrl-C reaches them through us alone
            )

    def standing_run(self, folder: Path) -> tuple[int, int] | None:
        """See Ranks.standing_run."""
        return standing_run(folder)


def require_gpus(run: Any, count: int) -> None:
    """Raise ValueError for more than one process, each with a GPU of its own, than there are GPUs
    on this machine, if the run is to be on them."""
    if count == 1:
        return
    import torch

    gpus = torch.cuda.device_count()
    if not (run.device or ("cuda" if gpus else "cpu")).startswith("cpu") and gpus < count:
        alone = count == num_processes(run)
        who = f"trainer.parallel {'asks' if alone else 'and placement ask'}"
        raise ValueError(
            f"{who} for {count} processes, each on a GPU of its own; torch finds {gpus}: give "
            "device=cpu or fewer"
        )


def say(text: str) -> None:
    """Tell the user what becomes of the processes."""
    with suppress(OSError):  # the terminal may be gone
        sys.stderr.write(f"samebit: {text}\n")  # in one piece: others write there, too
