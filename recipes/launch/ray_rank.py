"""The actor that holds one of a trainer's processes on a node of Ray: its child, as a local one is
its launcher's. What the launcher does to the process and sees of it goes over one connection.

Imports no torch.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import psutil
import ray

from samebit.recipes.launch.ray_connections import connect, interface_of

_DRAIN_S = 5.0  # for what a process that has ended has said; one of its own may hold the pipe


class Said(Enum):
    """What an actor tells its launcher."""

    BEGAN = "began"
    """The process is there: its number, and when it began."""
    OUT = "out"
    ERR = "err"
    """Bytes of its standard output, or error."""
    ENDED = "ended"
    """Its exit code, as subprocess has it."""


@dataclass(frozen=True)
class Seat:
    """Where an actor finds itself."""

    node: str
    address: str
    interface: str | None
    """That has the address."""
    gpus: str
    """Those that Ray has given it, as CUDA_VISIBLE_DEVICES has them."""
    has_folder: bool
    """Whether the node has the folder that the process is to run in."""


@dataclass(frozen=True)
class Start:
    """What an actor is to start."""

    words: Sequence[str]
    """Behind the node's own Python."""
    folder: str
    defaults: Mapping[str, str]
    """Of its environment, what the node's own wins over."""
    given: Mapping[str, str]
    """The rest, which wins over the node's."""
    says_all: bool
    """Whether its standard output is wanted, too."""
    leftovers: Sequence[tuple[int, float]]
    """Processes of the same run on this node, each with when it began, that are to end before."""


class Rank:
    """The actor."""

    def look(self, folder: str) -> Seat:
        """Where it is."""
        address = ray.util.get_node_ip_address()
        return Seat(
            node=ray.get_runtime_context().get_node_id(),
            address=address,
            interface=interface_of(address),
            gpus=",".join(map(str, ray.get_gpu_ids())),
            has_folder=Path(folder).is_dir(),
        )

    def run(self, place: tuple[str, int], key: bytes, start: Start) -> None:
        """Start the process, and serve whoever listens there and knows the key until it ends."""
        teller = _Teller(connect(place, key))
        _end(start.leftovers)
        # Ray's workers let no SIGINT through, and children inherit that.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        child = subprocess.Popen(
            [sys.executable, *start.words],
            env=_environment(start),
            cwd=start.folder,
            stdin=subprocess.PIPE,  # which ends with this process, and the child with that
            stdout=subprocess.PIPE if start.says_all else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        teller.tell(Said.BEGAN, (child.pid, psutil.Process(child.pid).create_time()))
        threading.Thread(target=_obey, args=(teller.connection, child), daemon=True).start()
        pipes = [(Said.OUT, child.stdout), (Said.ERR, child.stderr)]
        pumps = [
            threading.Thread(target=_pump, args=(teller, kind, pipe), daemon=True)
            for kind, pipe in pipes
            if pipe is not None
        ]
        for pump in pumps:
            pump.start()
        code = child.wait()
        for pump in pumps:
            pump.join(_DRAIN_S)
        teller.tell(Said.ENDED, code)


class _Teller:
    """The actor's end of the connection; several threads tell by it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def tell(self, kind: Said, what: Any) -> None:
        """Tell the launcher; nobody, where it is gone."""
        with self._lock, suppress(OSError):
            self.connection.send((kind, what))


def _environment(start: Start) -> dict[str, str]:
    # Ray has chosen threads by the CPUs that it has given; the run says its own.
    own = {name: x for name, x in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**start.defaults, **own, **start.given}


def _end(leftovers: Sequence[tuple[int, float]]) -> None:
    for number, began in leftovers:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(number)
            if process.create_time() == began:
                process.kill()
                process.wait()


def _obey(connection: Connection, child: subprocess.Popen[bytes]) -> None:
    """Pass signals on; the child is killed if the launcher is gone."""
    try:
        while True:
            child.send_signal(connection.recv())
    except (EOFError, OSError):
        child.kill()


def _pump(teller: _Teller, kind: Said, pipe: IO[bytes]) -> None:
    while said := os.read(pipe.fileno(), 1 << 16):
        teller.tell(kind, said)
