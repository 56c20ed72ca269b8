"""The processes of one run: started, watched and ended together, here or on a Ray cluster.

A signal to this process goes on to all of them. If one fails, the others have GRACE_S seconds to
notice. Under another launcher, which sets RANK and WORLD_SIZE, nothing is started here.

With max_restarts they are started again, all of them, once one has crashed: the run goes on from
its newest checkpoint. Then a run of one process is started and watched here too, without a rank.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from samebit.recipes.launch.launched import CRASHED, launcher_of, max_restarts
from samebit.recipes.launch.ranks import LocalRanks, RankProcess, Ranks, say
from samebit.recipes.launch.ray_package import LostActorError
from samebit.recipes.run.signals import handled_by, signal_name

GRACE_S = 30.0
_REFUSALS = (1, 2)  # what main returns of errors that would come again
_ENDED_BY_USER = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class _Failure:
    """The first process that failed."""

    said: str
    exit_code: int
    """As a shell has it."""

    @property
    def is_crash(self) -> bool:
        """Whether starting again may help: neither a refusal nor what somebody asked for."""
        asked = [128 + number for number in _ENDED_BY_USER]
        return self.exit_code not in (*_REFUSALS, *asked)

    def __str__(self) -> str:
        return self.said


def launch(command: Sequence[str], run: Any) -> int:
    """Start this command in as many processes as `run` asks for; returns the exit code.

    0 if all ended well, else that of the first that failed (128 + n if signal n ended it). After a
    crash they are started again, at most run.max_restarts times; not after a signal to this
    process. Raises ValueError for more processes than GPUs, if it is to run on them, and RayError
    for a cluster that has no places.
    """
    most = max_restarts(run)
    with _ranks_of(run) as ranks:
        earlier = ranks.standing_run(run.run_dir) if most else None
        words, processes = list(command), list[RankProcess]()
        restarts = 0
        with _forwarding(processes) as received:
            while failure := _run_once(ranks, words, processes, received):
                if received or not failure.is_crash or not most:
                    return failure.exit_code
                if restarts == most:
                    say(f"{failure} after {most} of {most} restarts; resume=true goes on")
                    return failure.exit_code
                restarts += 1
                say(f"{failure}; restart {restarts} of {most}, from the newest checkpoint if any")
                stands = ranks.standing_run(run.run_dir)
                if stands not in (None, earlier):  # else nothing stands to resume
                    words = [*command, "resume=true", "overwrite=false"]
        return 0


def _ranks_of(run: Any) -> AbstractContextManager[Ranks]:
    """What starts the run's processes; within it they may be."""
    if launcher_of(run) == "local":
        return nullcontext(LocalRanks(run))
    from samebit.recipes.launch.ray_ranks import ray_ranks

    return ray_ranks(run)


def _run_once(
    ranks: Ranks, command: Sequence[str], processes: list[RankProcess], received: Sequence[int]
) -> _Failure | None:
    """Start the processes, which take the place of those in the list, and wait for their end."""
    processes.clear()
    try:
        for process in ranks.start(command):
            processes.append(process)
            for number in received:
                process.send_signal(number)
        return _watch(processes)
    except LostActorError as error:
        say(f"{error}; the others are ended")
        return _Failure(str(error), CRASHED)
    finally:
        _kill_all(processes)


@contextmanager
def _forwarding(processes: Sequence[RankProcess]) -> Iterator[list[int]]:
    """Within it signals go on to the processes there are; gives those received so far."""
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    with handled_by(forward):
        yield received


def _watch(processes: Sequence[RankProcess]) -> _Failure | None:
    """Wait until all have ended; after the first failure, which is returned, not for long."""
    failure, patience = None, threading.Timer(GRACE_S, _kill_all, [processes])
    try:
        with ThreadPoolExecutor(len(processes)) as pool:
            ranks = {pool.submit(process.wait): rank for rank, process in enumerate(processes)}
            for future in as_completed(ranks):
                code = future.result()
                if code == 0 or failure is not None:
                    continue
                failure = _ended(ranks[future], code)
                patience.start()
                if len(processes) > 1:
                    say(f"{failure}; the others are ended within {GRACE_S:.0f} s")
    finally:
        patience.cancel()
    return failure


def _ended(rank: int, code: int) -> _Failure:
    """Of a process that ended with a code as subprocess has it: -n if signal n ended it."""
    if code > 0:
        return _Failure(f"rank {rank} ended with exit code {code}", code)
    return _Failure(f"rank {rank} ended with {signal_name(-code)}", 128 - code)


def _kill_all(processes: Sequence[RankProcess]) -> None:
    for process in processes:
        process.kill()
