"""placement.launcher=ray: a Ray cluster's nodes as places for the processes of a run.

Ray places and starts actors, says when one has died, and ends them. What the processes say to each
other goes over connections of their own. Imported only where a run asks for Ray.
"""

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from samebit.recipes.config import GrpoRun
from samebit.recipes.demo_config import DemoRun
from samebit.recipes.launch.launched import RAY_PLACES, num_processes, processes_here
from samebit.recipes.launch.ranks import require_gpus
from samebit.recipes.launch.ray_connections import LOOK_S, PLACE_S, accept, interface_of
from samebit.recipes.launch.ray_package import (
    RayError,
    in_our_words,
    is_on_gpu,
    require_own_cluster,
    require_reachable,
)
from samebit.recipes.run.secrets import is_secret_name
from samebit.recipes.run.signals import handlers_given_back
from samebit.rollout.device import resolve_device
from samebit.weight_sync.meeting import LOOPBACK, listener_at

logger = logging.getLogger(__name__)

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_STORE_BYTES = 100 << 20  # nothing large goes by Ray's object store
_NAMESPACE = "samebit"
_KEPT = ("PYTHONPATH", "PYTHONSAFEPATH", "OMP_NUM_THREADS", "CC", "CUDA_HOME", "XDG_CACHE_HOME")
_KEPT_BEGINNINGS = ("TRITON_", "TORCH_", "NCCL_", "GLOO_", "HF_")  # but for secrets: HF_TOKEN


class RayCluster:
    """Nodes of Ray, with places for a run's processes: bundles of a placement group.

    One for each tensor parallel group of the trainer's, which shares a node, and behind them one
    for each engine apart, whose tensor parallel processes share one, too.
    """

    def __init__(self, run: GrpoRun | DemoRun, has_trainers: bool) -> None:
        """Connect to the cluster where this process has its place, to that at
        placement.ray_address, or to one that is started on this machine.

        has_trainers: with places for the trainer's processes. Raises RayError if it cannot be had,
        or has no room, and ValueError for more processes than GPUs and for a cluster beside that
        of RAY_ADDRESS.
        """
        grpo = run.grpo if isinstance(run, DemoRun) else run
        told = json.loads(os.environ.get(RAY_PLACES, "{}"))
        address = told.get("address", grpo.placement.ray_address)
        engines = grpo.placement.num_engine_processes
        self._environment = told.get("environment", environment_of_actors(os.environ))
        self._run = run
        self.tensor = grpo.trainer.parallel.tensor
        self.num_groups = num_processes(run) // self.tensor if has_trainers or told else 0
        self.name = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
        if not told:
            require_own_cluster("placement.ray_address", address)
        if not address and has_trainers:
            require_gpus(run, num_processes(run) + engines)
        # What trainers say comes by connections.
        self._connect(address, engines, not has_trainers, told.get("runtime_env"))
        try:
            with in_our_words(f"{self.name} gave no places"):
                self.node = ray.get_runtime_context().get_node_id()
                self.address = ray.util.get_node_ip_address()
                self.on_gpu = self._is_on_gpu(elsewhere=has_trainers and bool(address))
                if address and not self.num_groups:
                    _use_interface_of(self.address)
                if told:
                    self._group = ray.util.get_placement_group(told["group"])
                else:
                    size = grpo.placement.engine_tensor
                    sizes = [self.tensor] * self.num_groups + [size] * (engines // size)
                    self._group = self._place(sizes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here; its actors end with that."""
        ray.shutdown()

    def as_told(self) -> dict[str, str]:
        """Return what a process in one of the places is told by its environment."""
        context = ray.get_runtime_context()
        of_job = json.loads(context.runtime_env.serialize())
        told = {"address": context.gcs_address, "group": self._group_name, "runtime_env": of_job}
        return {RAY_PLACES: json.dumps(told | {"environment": self._environment})}

    def nodes(self) -> list[str]:
        """Return the node of each place, once all places are there.

        Raises RayError for one that has been lost and was not replaced in time.
        """
        if not self._group.wait(PLACE_S):
            raise RayError(f"{self.name} has lost a place, and no other was free in {PLACE_S:g} s")
        found = ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        return [found[i] for i in range(len(found))]

    def start_actor(self, kind: type[Any], place: int) -> Any:
        """Begin to start an actor of a class in a place, of which it has one GPU or its CPUs."""
        remote: Any = ray.remote(kind)
        return remote.options(
            num_cpus=self._needs.get("CPU", 0),
            num_gpus=self._needs.get("GPU", 0),
            max_restarts=0,
            **self._where(place),
        ).remote()

    def ask[T](self, place: int, function: Callable[..., T], *arguments: Any) -> T:
        """Return what a function of ours gives on the node of a place."""
        remote: Any = ray.remote(function)
        asked = remote.options(num_cpus=0, **self._where(place)).remote(*arguments)
        return ray.get(asked, timeout=PLACE_S)

    def address_from(self, node: str) -> str:
        """Return this machine's address as processes on a node reach it."""
        return LOOPBACK if node == self.node else self.address

    def meet(self, node: str, method: Any, *arguments: Any) -> tuple[Any, Connection]:
        """Call a method of an actor on a node, with a place and a key before other arguments, by
        which it connects; returns the call and this end of the connection."""
        key = secrets.token_bytes(32)
        with listener_at(self.address_from(node)) as listener:
            called = method.remote(listener.getsockname()[:2], key, *arguments)
            return called, accept(listener, key, called)

    def _connect(
        self, address: str | None, engines: int, says: bool, of_job: Mapping[str, Any] | None
    ) -> None:
        if address:
            with in_our_words(f"{self.name} cannot be reached"):
                _join(address, says, runtime_env=dict(of_job) if of_job else None)
            return
        on_gpu = resolve_device(self._run.device).type == "cuda"
        count = self.num_groups * self.tensor + engines
        hidden = processes_here(self._run) if on_gpu and not self.num_groups else 0
        own = _own_cluster(count, self._run.cpu_threads, on_gpu)
        with in_our_words(f"{self.name} cannot be started"), _hidden_gpus(hidden):
            _begin("local", says, **own)

    def _is_on_gpu(self, elsewhere: bool) -> bool:
        """elsewhere: the trainer's devices are not this machine's."""
        if elsewhere:
            return is_on_gpu(self._run.device, ray.cluster_resources())
        return resolve_device(self._run.device).type == "cuda"

    @property
    def _needs(self) -> dict[str, float]:
        """Of one process."""
        return {"GPU": 1.0} if self.on_gpu else {"CPU": float(self._run.cpu_threads)}

    def _where(self, place: int) -> dict[str, Any]:
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, place),
            "runtime_env": {"env_vars": self._environment},
        }

    def _place(self, sizes: list[int]) -> Any:
        """A placement group with a bundle for each number of processes."""
        [(kind, amount)] = self._needs.items()
        self._group_name = f"samebit-{secrets.token_hex(8)}"
        bundles = [{kind: amount * size} for size in sizes]
        group = placement_group(bundles, strategy="PACK", name=self._group_name)
        if not group.wait(LOOK_S * 10):
            there, needed = ray.cluster_resources().get(kind, 0.0), amount * sum(sizes)
            said = f"{sum(sizes)} processes need {needed:g} {kind}, {self.name} has {there:g}"
            logger.warning("%s; waiting for what is busy or on its way", said)
            if not group.wait(PLACE_S):
                raise RayError(f"{said} in all: nothing was free within {PLACE_S:g} s")
        return group


@contextmanager
def open_cluster(run: GrpoRun | DemoRun, has_trainers: bool) -> Iterator[RayCluster]:
    """A run's cluster; within it what is started there lives. See RayCluster."""
    cluster = RayCluster(run, has_trainers)
    try:
        yield cluster
    finally:
        cluster.close()


def resources_at(address: str) -> dict[str, float]:
    """What the cluster there has in all, by Ray's names: CPU, GPU and others. Raises RayError if
    this process cannot join it."""
    with in_our_words(f"the Ray cluster at {address} cannot be reached"):
        _join(address, says=False)
        try:
            return ray.cluster_resources()
        finally:
            ray.shutdown()


def environment_of_actors(environment: Mapping[str, str]) -> dict[str, str]:
    """What of this process's environment an actor is to find in its own: no secret."""
    return {
        name: value
        for name, value in environment.items()
        if name in _KEPT or (name.startswith(_KEPT_BEGINNINGS) and not is_secret_name(name))
    }


def _join(address: str, says: bool, **options: Any) -> None:
    require_reachable(address)
    _begin(address, says, **options)


def _begin(address: str, says: bool, **options: Any) -> None:
    """says: whether what actors print is printed here."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with handlers_given_back():  # Ray takes SIGTERM for itself when it begins
        options |= {"namespace": _NAMESPACE, "log_to_driver": says}
        ray.init(address, logging_level=logging.WARNING, **options)


def _own_cluster(count: int, cpu_threads: int, on_gpu: bool) -> dict[str, Any]:
    """ray.init's arguments for one node that has what so many processes need, on the loopback."""
    return {
        "num_cpus": count * cpu_threads,
        "num_gpus": count if on_gpu else 0,
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
        "_node_ip_address": LOOPBACK,
    }


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
    if interface := interface_of(address):
        for name in INTERFACES:
            os.environ.setdefault(name, interface)
