"""Several processes of one run on this machine: started, watched and ended together.

Each runs the same command with its rank in the environment, which is complete before torch is
imported. A signal to this process goes on to all of them. If one fails, the others have GRACE_S
seconds to notice. If this process is killed, they end. Under another launcher, which sets RANK and
WORLD_SIZE, nothing is started here.
"""

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from samebit.recipes.run.signals import handled_by, signal_name

GRACE_S = 30.0
_FOLLOWS = "SAMEBIT_FOLLOWS_STDIN"


def num_processes(run: Any) -> int:
    """Return the number of processes that a run's configuration asks for."""
    return getattr(run, "num_processes", 1)


def is_launched() -> bool:
    """Say whether this process is one of those that a launcher has started."""
    return "RANK" in os.environ


def needs_launch(run: Any) -> bool:
    """Say whether the run's processes are still to be started."""
    return num_processes(run) > 1 and not is_launched() and not getattr(run, "dry_run", False)


def launched_rank() -> int:
    """Return this process's place among those that a launcher has started; 0 without one."""
    return int(os.environ.get("RANK", "0"))


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


def follow_launcher() -> None:
    """End when the launcher does: then its end of the standard input closes."""
    if os.environ.pop(_FOLLOWS, None):
        threading.Thread(target=_until_closed, daemon=True).start()


def _until_closed() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def launch(command: Sequence[str], run: Any) -> int:
    """Start this command in as many processes as `run` asks for; returns the exit code.

    0 if all ended well, else that of the first that failed (128 + n if signal n ended it). Raises
    ValueError for more processes than GPUs, if it is to run on them.
    """
    import torch

    from samebit.trainer.megatron.setup import DETERMINISTIC
    from samebit.weight_sync.meeting import SECRET, host_store, loopback_listener

    size, gpus = num_processes(run), torch.cuda.device_count()
    if not (run.device or ("cuda" if gpus else "cpu")).startswith("cpu") and gpus < size:
        raise ValueError(
            f"trainer.parallel asks for {size} processes, each on a GPU of its own; torch finds "
            f"{gpus}: give device=cpu or fewer"
        )
    # The processes meet here. The system chooses the port, and nobody can take it in between.
    store = host_store(loopback_listener())
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        SECRET: secrets.token_hex(32),
        _FOLLOWS: "1",
    }
    defaults = DETERMINISTIC | {"OMP_NUM_THREADS": str(getattr(run, "cpu_threads", 1))}
    processes: list[subprocess.Popen[bytes]] = []
    with _forwarding(processes) as received:
        for rank in range(size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
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


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    def kill_all() -> None:
        for process in processes:
            process.kill()

    result, patience = 0, threading.Timer(GRACE_S, kill_all)
    try:
        with ThreadPoolExecutor(len(processes)) as pool:
            ranks = {pool.submit(process.wait): rank for rank, process in enumerate(processes)}
            for future in as_completed(ranks):
                code = future.result()
                if code == 0 or result != 0:
                    continue
                result = code if code > 0 else 128 - code
                patience.start()
                how = f"exit code {code}" if code > 0 else signal_name(-code)
                with suppress(OSError):  # the terminal may be gone
                    print(
                        f"samebit: rank {ranks[future]} ended with {how}; the others are ended "
                        f"within {GRACE_S:.0f} s",
                        file=sys.stderr,
                    )
    finally:
        patience.cancel()
        kill_all()
    return result
