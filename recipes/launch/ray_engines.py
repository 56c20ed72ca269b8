"""Engines as actors of a Ray cluster, on whatever nodes Ray has for them.

What trainer and engines say to each other goes over connections of their own, as between local
processes, and weights over weight groups.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import ray
import torch

from samebit.recipes.config import GrpoRun
from samebit.recipes.launch.ray_cluster import RayCluster, open_cluster
from samebit.recipes.launch.ray_connections import (
    PLACE_S,
    connect,
    end_actor,
    has_ended,
    shut,
    starting,
)
from samebit.recipes.launch.ray_package import LostActorError
from samebit.rollout.engine_process import serve
from samebit.rollout.remote_ranks import Launched, Launcher, RemoteEngineError, settings_of
from samebit.weight_sync.meeting import LOOPBACK


class _Rank:
    """The actor: one of an engine's processes on one of Ray's nodes."""

    def place(self) -> tuple[str, str, int, list[str]]:
        """Its node, that node's address, its process, and the GPUs that Ray has given it."""
        node = ray.get_runtime_context().get_node_id()
        gpus = list(map(str, ray.get_gpu_ids()))
        return node, ray.util.get_node_ip_address(), os.getpid(), gpus

    def serve(
        self,
        place: tuple[str, int],
        key: bytes,
        gpus: list[str],
        model_path: str,
        threads: int,
        settings: dict,
    ) -> None:
        """Serve an engine, whose ranks have these GPUs together and read each other's, to whoever
        listens there and knows the key."""
        if len(gpus) > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        serve(connect(place, key), model_path, threads, settings)


class ActorProcess:
    """An EngineProcess: one that Ray has started. Its exit code is Ray's alone."""

    exitcode = None

    def __init__(self, actor: Any, pid: int, served: Any, connection: Connection) -> None:
        self.pid = pid
        self._actor, self._served, self._connection = actor, served, connection
        self._is_killed = False

    def is_alive(self) -> bool:
        """Whether it serves."""
        return not self._is_killed and not has_ended(self._served, 0)

    def kill(self) -> None:
        """See EngineProcess.kill. One that stands still takes Ray some seconds."""
        self._is_killed = True
        end_actor(self._actor)
        shut(self._connection)

    def join(self, timeout: float | None = None) -> None:
        """See EngineProcess.join. Its place is free then."""
        if has_ended(self._served, timeout):
            end_actor(self._actor)


class RayEngines:
    """Starts a run's engines, each in its place of a cluster."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster

    @property
    def device(self) -> torch.device:
        """Of an engine's first process, as its actor sees it: the engine's first GPU."""
        return torch.device("cuda", 0) if self._cluster.on_gpu else torch.device("cpu")

    def launcher(self, replica: int) -> Launcher:
        """The Launcher of a replica; it raises RemoteEngineError for an actor that dies there."""

        def launch(
            model_path: str, threads: int, settings: dict[str, Any], size: int
        ) -> list[Launched]:
            try:
                with starting(f"replica {replica}", self._cluster.name):
                    return self._launch(replica, (model_path, threads), settings, size)
            except LostActorError as error:
                raise RemoteEngineError(str(error)) from error

        return launch

    def _launch(
        self, replica: int, arguments: tuple[str, int], settings: dict[str, Any], size: int
    ) -> list[Launched]:
        cluster, launched = self._cluster, list[Launched]()
        place = cluster.num_groups + replica
        actors = [cluster.start_actor(_Rank, place) for _ in range(size)]
        try:
            places = ray.get([actor.place.remote() for actor in actors], timeout=PLACE_S)
            gpus = [gpu for *_, own in places for gpu in own]
            for rank, (actor, (node, address, pid, _)) in enumerate(
                zip(actors, places, strict=True)
            ):
                told = gpus, *arguments, settings_of(rank, settings)
                served, connection = cluster.meet(node, actor.serve, *told)
                here = cluster.address_from(node)
                process = ActorProcess(actor, pid, served, connection)
                where = here, "" if here == LOOPBACK else address
                launched.append(Launched(process, connection, *where))
        except BaseException:
            for actor in actors:
                end_actor(actor)
            raise
        return launched


@contextmanager
def open_engines(run: GrpoRun) -> Iterator[RayEngines]:
    """What starts a run's engines; within it they live.

    Raises RayError if the cluster cannot be had, or has no room.
    """
    with open_cluster(run, has_trainers=False) as cluster:
        yield RayEngines(cluster)
