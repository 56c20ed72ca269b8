"""Several processes of one run on this machine: started, watched and ended together.

Each runs the same command with its rank in the environment, which is complete before torch is
imported. A signal to this process goes on to all of them. If one fails, the others have GRACE_S
seconds to notice. If this process is killed, they end. Under another launcher, which sets RANK and
WORLD_SIZE, nothing is started here.

With max_restarts they are started again, all of them, once one has crashed: the run goes on from
its newest checkpoint. Then a run of one process is started and watched here too, without a rank.
"""

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from samebit.recipes.config import ConfigError
from samebit.recipes.run.signals import handled_by, signal_name

GRACE_S = 30.0
CRASHED = os.EX_SOFTWARE
"""The exit code of one of a launcher's processes after an error that starting again may mend."""
_FOLLOWS = "SAMEBIT_FOLLOWS_STDIN"
_REFUSALS = (1, 2)  # what main returns of errors that would come again
_ENDED_BY_USER = (signal.SIGINT, signal.SIGTERM)


def num_processes(run: Any) -> int:
    """Return the number of processes that a run's configuration asks for."""
    return getattr(run, "num_processes", 1)


def max_restarts(run: Any) -> int:
    """Return how often a run's processes may be started again."""
    return getattr(run, "max_restarts", 0)


def is_launched() -> bool:
    """Say whether this process is one of those that a launcher has started."""
    return "RANK" in os.environ


def needs_launch(run: Any) -> bool:
    """Say whether the run's processes are still to be started."""
    is_started = is_launched() or _FOLLOWS in os.environ
    several = num_processes(run) > 1 or max_restarts(run) > 0
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
    follows = os.environ.pop(_FOLLOWS, None) is not None
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


@dataclass(frozen=True)
class _Failure:
    """The first process that failed."""

    rank: int
    returncode: int
    """As subprocess has it: -n if signal n ended it."""

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        return self.returncode if self.returncode > 0 else 128 - self.returncode

    @property
    def is_crash(self) -> bool:
        """Whether starting again may help: neither a refusal nor what somebody asked for."""
        asked = [128 + number for number in _ENDED_BY_USER]
        return self.exit_code not in (*_REFUSALS, *asked)

    def __str__(self) -> str:
        code = self.returncode
        how = f"exit code {code}" if code > 0 else signal_name(-code)
        return f"rank {self.rank} ended with {how}"


def launch(command: Sequence[str], run: Any) -> int:
    """Start this command in as many processes as `run` asks for; returns the exit code.

    0 if all ended well, else that of the first that failed (128 + n if signal n ended it). After a
    crash they are started again, at most run.max_restarts times; not after a signal to this
    process. Raises ValueError for more processes than GPUs, if it is to run on them.
    """
    most = max_restarts(run)
    _require_gpus(run)
    from samebit.recipes.run.folder import standing_run

    earlier = standing_run(run.run_dir) if most else None
    words, processes = list(command), list[subprocess.Popen[bytes]]()
    restarts = 0
    with _forwarding(processes) as received:
        while failure := _run_once(words, run, processes, received):
            if received or not failure.is_crash or not most:
                return failure.exit_code
            if restarts == most:
                _say(f"{failure} after {most} of {most} restarts; resume=true goes on")
                return failure.exit_code
            restarts += 1
            _say(f"{failure}; restart {restarts} of {most}, from the newest checkpoint if any")
            if standing_run(run.run_dir) not in (None, earlier):  # else nothing stands to resume
                words = [*command, "resume=true", "overwrite=false"]
    return 0


def _require_gpus(run: Any) -> None:
    size = num_processes(run)
    if size == 1:
        return
    import torch

    gpus = torch.cuda.device_count()
    if not (run.device or ("cuda" if gpus else "cpu")).startswith("cpu") and gpus < size:
        raise ValueError(
            f"trainer.parallel asks for {size} processes, each on a GPU of its own; torch finds "
            f"{gpus}: give device=cpu or fewer"
        )


def _run_once(
    command: Sequence[str],
    run: Any,
    processes: list[subprocess.Popen[bytes]],
    received: Sequence[int],
) -> _Failure | None:
    """Start the processes, which take the place of those in the list, and wait for their end."""
    size, defaults, shared, store = num_processes(run), dict[str, str](), {_FOLLOWS: "1"}, None
    if size > 1:
        from samebit.trainer.megatron.setup import DETERMINISTIC
        from samebit.weight_sync.meeting import LOOPBACK, SECRET, host_store, loopback_listener

        # They meet here. The system chooses the port, and nobody can take it in between.
        store = host_store(loopback_listener())
        shared |= {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            SECRET: secrets.token_hex(32),
        }
        defaults |= DETERMINISTIC | {"OMP_NUM_THREADS": str(getattr(run, "cpu_threads", 1))}
    processes.clear()
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        processes.append(
            subprocess.Popen(
                command,
                env=defaults | os.environ | shared | place,
                stdin=subprocess.PIPE,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                start_new_session=True,  # the terminal's Ctrl-C reaches them through us alone
            )
        )
        for number in received:
            processes[rank].send_signal(number)
    return _watch(processes)


@contextmanager
def _forwarding(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Within it signals go on to the processes there are; gives those received so far."""
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    with handled_by(forward):
        yield received


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> _Failure | None:
    """Wait until all have ended; after the first failure, which is returned, not for long."""

    def kill_all() -> None:
        for process in processes:
            process.kill()

    failure, patience = None, threading.Timer(GRACE_S, kill_all)
    try:
        with ThreadPoolExecutor(len(processes)) as pool:
            ranks = {pool.submit(process.wait): rank for rank, process in enumerate(processes)}
            for future in as_completed(ranks):
                code = future.result()
                if code == 0 or failure is not None:
                    continue
                failure = _Failure(ranks[future], code)
                patience.start()
                if len(processes) > 1:
                    _say(f"{failure}; the others are ended within {GRACE_S:.0f} s")
    finally:
        patience.cancel()
        kill_all()
    return failure


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"samebit: {text}", file=sys.stderr)
