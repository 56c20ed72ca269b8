"""The processes of a run as Ranks on a Ray cluster: each a child of an actor, in its place.

They meet at this machine's address as Ray tells it, or where Ray has them all on this machine at
the loopback. What they say comes out here. Where their folder is, is told at the start.
"""

import os
import secrets
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray

from samebit.recipes.launch.ranks import Meeting, RankProcess, meeting_of, place_of, say
from samebit.recipes.launch.ray_cluster import INTERFACES, RayCluster, open_cluster
from samebit.recipes.launch.ray_connections import (
    LOOK_S,
    PLACE_S,
    end_actor,
    has_ended,
    shut,
    starting,
)
from samebit.recipes.launch.ray_package import RayError, in_our_words
from samebit.recipes.launch.ray_rank import Rank, Said, Seat, Start
from samebit.recipes.run.folder import standing_run
from samebit.weight_sync.meeting import LOOPBACK, own_secret

_LOST = -signal.SIGKILL
"""The exit code of a process whose actor or node is gone."""


class ActorRank:
    """A RankProcess that is an actor's child."""

    def __init__(self, node: str, actor: Any, served: Any, connection: Connection) -> None:
        self.node = node
        self.child: tuple[int, float] | None = None
        """Its number there, and when it began."""
        self._actor = actor
        self._served, self._connection = served, connection
        self._code: int | None = None
        self._has_ended = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def poll(self) -> int | None:
        """See RankProcess.poll."""
        return self._code

    def wait(self) -> int:
        """See RankProcess.wait."""
        self._has_ended.wait()
        assert self._code is not None
        return self._code

    def send_signal(self, sig: int) -> None:
        """See RankProcess.send_signal."""
        with suppress(OSError):  # it is gone
            self._connection.send(int(sig))

    def kill(self) -> None:
        """See RankProcess.kill; the actor ends too, which kills the process as it goes."""
        if not self._has_ended.is_set():
            self.send_signal(signal.SIGKILL)
            self._has_ended.wait(LOOK_S)
        shut(self._connection)
        end_actor(self._actor)

    def _read(self) -> None:
        streams = {Said.OUT: 1, Said.ERR: 2}
        try:
            while self._code is None:
                kind, what = self._next()
                if kind is Said.BEGAN:
                    self.child = what
                elif kind is Said.ENDED:
                    self._code = what
                else:
                    _write(streams[kind], what)
        except (EOFError, OSError, ray.exceptions.RayError):  # Ray may be gone itself
            self._code = _LOST
        finally:
            self._has_ended.set()

    def _next(self) -> tuple[Said, Any]:
        """What the actor tells next; EOFError if it is gone, as Ray says or the connection."""
        while not self._connection.poll(LOOK_S):
            if has_ended(self._served, 0) and not self._connection.poll(LOOK_S):
                raise EOFError
        return self._connection.recv()


class RayRanks:
    """The Ranks in places of a cluster."""

    def __init__(self, run: Any, cluster: RayCluster) -> None:
        self._run, self._cluster = run, cluster
        self._meeting = Meeting(None)
        self._processes: list[ActorRank] = []  # of all starts: one may leave those before to others
        self._told = ""

    def start(self, command: Sequence[str]) -> Iterator[RankProcess]:
        """See Ranks.start. Raises RayError for nodes that the run cannot be on."""
        before = tuple(self._processes)
        actors = [self._cluster.start_actor(Rank, place) for place in self._places()]
        try:
            seats = self._seats(actors)
            is_here = all(seat.node == self._cluster.node for seat in seats)
            self._meeting = meeting_of(self._run, LOOPBACK if is_here else self._cluster.address)
            for rank, (actor, seat) in enumerate(zip(actors, seats, strict=True)):
                start = Start(
                    words=command[1:],
                    folder=os.getcwd(),
                    defaults=self._defaults(seat),
                    given=self._told_to(rank, seats),
                    says_all=rank == 0,
                    leftovers=[p.child for p in before if p.child and p.node == seat.node],
                )
                with starting(f"rank {rank}", self._cluster.name):
                    served, connection = self._cluster.meet(seat.node, actor.run, start)
                process = ActorRank(seat.node, actor, served, connection)
                self._processes.append(process)
                yield process
        except BaseException:
            for actor in actors:
                end_actor(actor)
            raise

    def standing_run(self, folder: Path) -> tuple[int, int] | None:
        """See Ranks.standing_run."""
        with in_our_words(f"rank 0's place on {self._cluster.name} did not answer"):
            return self._cluster.ask(self._places()[0], standing_run, folder.absolute())

    def _places(self) -> list[int]:
        """The place of each rank. Neighbours are on one node as far as that can be."""
        nodes, groups = self._cluster.nodes(), range(self._cluster.num_groups)
        by_node = sorted(groups, key=nodes.__getitem__)
        return [place for place in by_node for _ in range(self._cluster.tensor)]

    def _seats(self, actors: Sequence[Any]) -> list[Seat]:
        """Where the actors are; told if it is not where they were before."""
        here = os.getcwd()
        with starting("a trainer's actor", self._cluster.name):
            looked = [actor.look.remote(here) for actor in actors]
            seats: list[Seat] = ray.get(looked, timeout=PLACE_S)
        for rank, seat in enumerate(seats):
            if not seat.has_folder:
                raise RayError(
                    f"node {seat.address}, rank {rank}'s, has no folder {here}, where this command "
                    "is: run it in one that all nodes have"
                )
        if len({seat.node for seat in seats}) > 1:
            self._require_shared(seats)
        if (told := ranks_by_node(seats)) != self._told:
            folder = self._run.run_dir.absolute()
            say(f"{told}; the run's folder is {folder} on {seats[0].address}")
            self._told = told
        return seats

    def _require_shared(self, seats: Sequence[Seat]) -> None:
        """RayError unless all nodes see in the run's folder what rank 0's has put there."""
        folder, name = self._run.run_dir.absolute(), f".samebit-{secrets.token_hex(8)}"
        places = self._places()
        probe = self._cluster.ask(places[0], leave_probe, folder, name)
        try:
            firsts = {seat.node: rank for rank, seat in reversed(list(enumerate(seats)))}
            for rank in firsts.values():
                if not self._cluster.ask(places[rank], Path.exists, probe):
                    raise RayError(
                        f"output_dir is {self._run.output_dir!r}; it must be in a file system that "
                        f"the nodes share: {seats[rank].address} (rank {rank}) does not see what "
                        f"{seats[0].address} (rank 0) has written to {probe.parent}"
                    )
        finally:
            self._cluster.ask(places[0], Path.unlink, probe)

    def _told_to(self, rank: int, seats: Sequence[Seat]) -> dict[str, str]:
        """What a rank finds in its environment, whatever its node has there."""
        node = seats[rank].node
        here = [other for other, seat in enumerate(seats) if seat.node == node]
        gpus = ",".join(seats[other].gpus for other in here) if self._cluster.on_gpu else ""
        place = place_of(rank, here.index(rank), len(here)) if len(seats) > 1 else {}
        shared = self._meeting.environment | self._cluster.as_told()
        return shared | place | {"CUDA_VISIBLE_DEVICES": gpus}

    def _defaults(self, seat: Seat) -> dict[str, str]:
        """What a rank finds in its environment unless its node has it, too: what this process does,
        but for what is Ray's. Over several nodes it uses the interface that Ray does."""
        is_local = len(set(self._cluster.nodes())) == 1 or seat.interface is None
        named = {} if is_local else dict.fromkeys(INTERFACES, str(seat.interface))
        own = {name: x for name, x in os.environ.items() if not name.startswith("RAY_")}
        return self._meeting.defaults | named | own


@contextmanager
def ray_ranks(run: Any) -> Iterator[RayRanks]:
    """What starts a run's processes on a cluster, on which they live.

    Raises RayError if the cluster cannot be had, or has no room.
    """
    own_secret()  # taken out of the environment, which Ray's processes inherit
    # Standard output is rank 0's, past Python; Ray would print there what it has to say.
    with redirect_stdout(sys.stderr), open_cluster(run, has_trainers=True) as cluster:
        yield RayRanks(run, cluster)


def ranks_by_node(seats: Sequence[Seat]) -> str:
    """Say which ranks are where: those of a node are neighbours."""
    counts = Counter(seat.address for seat in seats)
    firsts = {seat.address: rank for rank, seat in reversed(list(enumerate(seats)))}
    spans = []
    for address, count in counts.items():
        first, last = firsts[address], firsts[address] + count - 1
        ranks = f"rank {first}" if count == 1 else f"ranks {first}-{last}"
        spans.append(f"{ranks} on {address}")
    return ", ".join(spans)


def leave_probe(folder: Path, name: str) -> Path:
    """Make an empty file of this name in a folder, or in the nearest above it that is there."""
    probe = next(each for each in (folder, *folder.parents) if each.is_dir()) / name
    probe.touch()
    return probe


def _write(stream: int, said: bytes) -> None:
    with suppress(OSError):  # the terminal may be gone
        while said:
            said = said[os.write(stream, said) :]
