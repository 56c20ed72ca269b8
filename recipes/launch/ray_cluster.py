"""placement.launcher=ray: engines as actors of a Ray cluster, on whatever nodes Ray has for them.

Ray places and starts the processes, says when one has died, and ends them. What trainer and engines
say to each other goes over connections of their own, as between local processes, and weights over
weight groups. Imported only where a run asks for Ray.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

import psutil
import ray
import torch
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from samebit.recipes.config import GrpoRun
from samebit.recipes.launch.processes import processes_here
from samebit.recipes.launch.ray_package import RayError, in_our_words
from samebit.recipes.run.signals import handlers_given_back
from samebit.rollout.device import resolve_device
from samebit.rollout.engine_process import serve
from samebit.rollout.remote import Launched, Launcher
from samebit.weight_sync.meeting import LOOPBACK, listener_at

logger = logging.getLogger(__name__)

_REACH_S = 10.0
_PLACE_S = 300.0
"""How long nodes, or an actor on them, may take to be there."""
_LOOK_S = 0.5
_STORE_BYTES = 100 << 20  # nothing large goes by Ray's object store
_KEPT = ("PYTHONPATH", "PYTHONSAFEPATH", "OMP_NUM_THREADS", "CC", "CUDA_HOME", "XDG_CACHE_HOME")
_KEPT_BEGINNINGS = ("TRITON_", "TORCH_", "NCCL_", "GLOO_", "HF_")
_SETTINGS = b"\4"  # the type of the first frame of HTTP/2, from either end
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class _Replica:
    """The actor: an engine's process on one of Ray's nodes."""

    def place(self) -> tuple[str, str, int]:
        """Its node, that node's address, and its process."""
        node = ray.get_runtime_context().get_node_id()
        return node, ray.util.get_node_ip_address(), os.getpid()

    def serve(
        self, place: tuple[str, int], key: bytes, model_path: str, threads: int, settings: dict
    ) -> None:
        """Serve an engine to whoever listens there and knows the key."""
        connection = Client(place, authkey=key)
        _send_at_once(connection)
        serve(connection, model_path, threads, settings)


class ActorProcess:
    """An EngineProcess: one that Ray has started. Its exit code is Ray's alone."""

    exitcode = None

    def __init__(self, actor: Any, pid: int, served: Any, connection: Connection) -> None:
        self.pid = pid
        self._actor, self._served, self._connection = actor, served, connection
        self._is_killed = False

    def is_alive(self) -> bool:
        """Whether it serves."""
        return not self._is_killed and ray.is_initialized() and not _has_ended(self._served, 0)

    def kill(self) -> None:
        """See EngineProcess.kill. One that stands still takes Ray some seconds."""
        self._is_killed = True
        _kill(self._actor)
        with suppress(OSError), _socket_of(self._connection) as end:  # it may be closed
            end.shutdown(socket.SHUT_RDWR)

    def join(self, timeout: float | None = None) -> None:
        """See EngineProcess.join. Its place is free then."""
        if ray.is_initialized() and _has_ended(self._served, timeout):
            _kill(self._actor)


class RayCluster:
    """Nodes of Ray, with a place for each replica of a run: a bundle of a placement group."""

    def __init__(self, run: GrpoRun) -> None:
        """Connect to the cluster at placement.ray_address, or start one on this machine.

        Raises RayError if it cannot be had, or has no room.
        """
        self._environment = environment_of_actors(os.environ)
        self._on_gpu = resolve_device(run.device).type == "cuda"
        needs = {"GPU": 1.0} if self._on_gpu else {"CPU": float(run.cpu_threads)}
        address, replicas = run.placement.ray_address, run.placement.replicas
        self._name = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
        with in_our_words(f"{self._name} cannot be reached"):
            if address:
                _require_reachable(address)
                options: dict[str, Any] = {"address": address}
            else:
                own = _own_cluster(replicas, run.cpu_threads, self._on_gpu)
                options = {"address": "local"} | own
            # Ray takes SIGTERM for itself when it begins.
            hidden = processes_here(run) if self._on_gpu and not address else 0
            with handlers_given_back(), _hidden_gpus(hidden):
                os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
                ray.init(logging_level=logging.WARNING, log_to_driver=True, **options)
        try:
            with in_our_words(f"{self._name} gave no places"):
                self._node = ray.get_runtime_context().get_node_id()
                self._address = ray.util.get_node_ip_address()
                if address:
                    _use_interface_of(self._address)
                self._group = self._place([needs] * replicas)
            self._needs = needs
        except BaseException:
            self.close()
            raise

    @property
    def device(self) -> torch.device:
        """An engine's, as its actor sees it: Ray shows it one GPU."""
        return torch.device("cuda", 0) if self._on_gpu else torch.device("cpu")

    def launcher(self, place: int) -> Launcher:
        """The Launcher of the replica of a place."""
        return partial(self._launch, place)

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here; the replicas end with that."""
        ray.shutdown()

    def _place(self, bundles: list[dict[str, float]]) -> Any:
        group = placement_group(bundles, strategy="PACK")
        if not group.wait(_LOOK_S * 10):
            there = {name: ray.cluster_resources().get(name, 0.0) for name in bundles[0]}
            said = f"{len(bundles)} replicas need {bundles[0]} each, {self._name} has {there}"
            logger.warning("%s; waiting for what is busy or on its way", said)
            if not group.wait(_PLACE_S):
                raise RayError(f"{said} in all: nothing was free within {_PLACE_S:g} s")
        return group

    def _launch(
        self, place: int, model_path: str, threads: int, settings: dict[str, Any]
    ) -> Launched:
        with in_our_words(f"replica {place} could not be started on {self._name}"):
            where = PlacementGroupSchedulingStrategy(self._group, place)
            kind: Any = ray.remote(_Replica)
            actor = kind.options(
                num_cpus=self._needs.get("CPU", 0),
                num_gpus=self._needs.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy=where,
                runtime_env={"env_vars": self._environment},
            ).remote()
            try:
                node, address, pid = ray.get(actor.place.remote(), timeout=_PLACE_S)
                here = LOOPBACK if node == self._node else self._address
                key = secrets.token_bytes(32)
                with listener_at(here) as listener:
                    at = listener.getsockname()[:2]
                    served = actor.serve.remote(at, key, model_path, threads, settings)
                    connection = _accept(listener, key, served)
            except BaseException:
                _kill(actor)
                raise
            process = ActorProcess(actor, pid, served, connection)
            return Launched(process, connection, here, "" if node == self._node else address)


@contextmanager
def open_cluster(run: GrpoRun) -> Iterator[RayCluster]:
    """A run's cluster; within it the run's engines live."""
    cluster = RayCluster(run)
    try:
        yield cluster
    finally:
        cluster.close()


def environment_of_actors(environment: Mapping[str, str]) -> dict[str, str]:
    """What of this process's environment an engine is to find in its own: no secret."""
    return {
        name: value
        for name, value in environment.items()
        if name in _KEPT or name.startswith(_KEPT_BEGINNINGS)
    }


def _own_cluster(replicas: int, cpu_threads: int, on_gpu: bool) -> dict[str, Any]:
    """ray.init's arguments for one node that has what the replicas need, on the loopback."""
    return {
        "num_cpus": replicas * cpu_threads,
        "num_gpus": replicas if on_gpu else 0,
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
        "_node_ip_address": LOOPBACK,
    }


def _require_reachable(address: str) -> None:
    """See that something there speaks gRPC: Ray itself would try for a quarter of an hour."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S) as end:
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            end.sendall(_HTTP2_HELLO)
            if end.recv(9)[3:4] != _SETTINGS:
                raise ConnectionError("what listens there is not Ray")


@contextmanager
def _hidden_gpus(trainers: int) -> Iterator[None]:
    """Within it the trainer's GPUs, the first ones, are none of those that Ray may give to
    engines. 0: nothing changes."""
    name = "CUDA_VISIBLE_DEVICES"
    had = os.environ.get(name)
    if trainers:
        count = torch.cuda.device_count()
        seen = had.split(",") if had else list(map(str, range(count)))
        os.environ[name] = ",".join(seen[trainers:count])
    try:
        yield
    finally:
        if trainers and had is None:
            del os.environ[name]
        elif trainers and had is not None:
            os.environ[name] = had


def _use_interface_of(address: str) -> None:
    """Have gloo and NCCL use the interface of this machine's address, unless one is named."""
    for interface, found in psutil.net_if_addrs().items():
        if any(each.address == address for each in found):
            for name in _INTERFACES:
                os.environ.setdefault(name, interface)


def _has_ended(served: Any, timeout: float | None) -> bool:
    return bool(ray.wait([served], timeout=timeout)[0])


def _kill(actor: Any) -> None:
    """Asked of no Ray that is gone, it would begin anew."""
    if ray.is_initialized():
        with suppress(Exception):  # it is dead, or Ray is
            ray.kill(actor)


def _accept(listener: socket.socket, key: bytes, served: Any) -> Connection:
    """The connection of who knows the key; raises what has ended the actor before."""
    listener.settimeout(_LOOK_S)
    deadline = time.monotonic() + _PLACE_S
    while time.monotonic() < deadline:
        if _has_ended(served, 0):
            ray.get(served)
        try:
            end, _ = listener.accept()
        except TimeoutError:
            continue
        end.settimeout(None)
        connection = Connection(end.detach())
        with suppress(AuthenticationError, EOFError, OSError):  # somebody else's
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            _send_at_once(connection)
            return connection
        connection.close()
    raise RayError(f"its actor did not connect within {_PLACE_S:g} s")


def _send_at_once(connection: Connection) -> None:
    """Small messages wait for no others; a machine that vanishes is noticed in minutes."""
    with _socket_of(connection) as end:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10)):
            end.setsockopt(socket.IPPROTO_TCP, option, value)


def _socket_of(connection: Connection) -> socket.socket:
    """Another handle of what it goes over."""
    return socket.socket(fileno=os.dup(connection.fileno()))
