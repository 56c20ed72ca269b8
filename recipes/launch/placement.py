"""Where the engine runs and how weights reach it."""

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from samebit.kernels.named import import_named
from samebit.kernels.reduce import RankGroup
from samebit.kernels.registry import attention_kind
from samebit.recipes.config import GrpoRun, SftRun
from samebit.recipes.launch.launched import is_on_ray, launched_rank, processes_here
from samebit.recipes.launch.led_engine import LedEngine, told
from samebit.recipes.launch.online_draft import OnlineDraft
from samebit.recipes.launch.replicas import ReplicatedEngine
from samebit.recipes.launch.updates import engine_device, why_not_here
from samebit.recipes.run.phase_ledger import TRAINER_TURN
from samebit.rollout.client import EngineClient
from samebit.rollout.config import EngineConfig
from samebit.rollout.device import resolve_device, why_not_releasable
from samebit.rollout.engine import Engine
from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.remote_ranks import Launcher, launch_here
from samebit.rollout.runtime.weights import load_safetensors
from samebit.trainer.megatron.critic import ActorCritic
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import is_first, place
from samebit.weight_sync.meeting import own_secret
from samebit.weight_sync.transports.base import Lease, WeightSync
from samebit.weight_sync.transports.registry import TRANSPORTS

if TYPE_CHECKING:
    from samebit.recipes.launch.ray_engines import RayEngines

logger = logging.getLogger(__name__)

KV_FRACTION = 0.85
"""Of what is free while no gradients are resident. What is left, 6 GiB of 40, holds the graphs'
activations and those of a prefill step."""


def load_weights(trainer: MegatronTrainer, model_path: str) -> None:
    """Fill the trainer's parameters from a Hugging Face folder."""
    whole = trainer.model.param_specs()
    trainer.fill(lambda specs, params: load_safetensors(Path(model_path), specs, params, whole))


def make_trainer(
    run: SftRun | GrpoRun,
    model: ModelConfig,
    num_updates: int,
    device: torch.device,
    releasable: bool = False,
) -> MegatronTrainer:
    """Make the trainer that the run asks for, with the weights of its model's folder; a critic is
    yet to be given to it.

    releasable: so that its gradients can be released, see `releases_memory`.
    """
    settings, numerics = run.trainer, run.numerics
    has_critic = isinstance(run, GrpoRun) and run.critic is not None
    trainer = (ActorCritic if has_critic else MegatronTrainer)(
        model,
        settings.optimizer,
        num_updates,
        device,
        settings.parallel,
        numerics.tp_invariant,
        longest=settings.micro_batch_tokens,
        attention=attention_kind(numerics.attention),
        releasable=releasable,
        grad_segments=numerics.grad_segments,
    )
    load_weights(trainer, run.model.path)
    return trainer


def releases_memory(run: GrpoRun, device: torch.device) -> bool:
    """Whether engine and trainer give each other memory, phase by phase.

    Raises ValueError for placement.release_memory=true where memory cannot be released.
    """
    wanted = run.placement.release_memory
    if wanted is None:
        alone = device.type == "cuda" and run.placement.engine == "colocated"
        if not alone or run.engine.releasable is False:
            return False
    if wanted is False:
        return False
    if why_not := why_not_releasable(device):
        if wanted:
            raise ValueError(f"placement.release_memory=true cannot be: {why_not}")
        logger.warning("engine and trainer keep their memory beside each other: %s", why_not)
    return not why_not


def require_transport(run: GrpoRun) -> None:
    """Raise ValueError for a transport that cannot be had, or not on this machine's devices."""
    name, device = run.placement.transport, resolve_device(run.device)
    load_transport(name)
    size, gpus = run.placement.engine_tensor, TRANSPORTS[name].gpus if name in TRANSPORTS else 2
    if size > 1 and gpus < 2 and device.type == "cuda":
        raise ValueError(
            f"placement.transport is {name!r}; on GPUs it must be nccl with "
            f"placement.engine_tensor={size}: engines behind another one are on the trainer's GPU"
        )
    between_gpus = name in TRANSPORTS and TRANSPORTS[name].gpus > 0
    by_ray = run.placement.ray_address is not None or is_on_ray()
    elsewhere = by_ray and (device.type == "cuda" or run.dry_run)
    if between_gpus and not elsewhere and launched_rank() == 0:  # beside which engines start
        counts = run.placement.num_engine_processes, processes_here(run)
        if reason := why_not_here(name, device, *counts):
            raise ValueError(f"placement.transport: {reason}")


def require_launcher(run: GrpoRun) -> None:
    """Raise ValueError for a launcher that has not started this process and has nothing to."""
    is_idle = run.placement.engine == "colocated" and not (run.dry_run or is_on_ray())
    if run.placement.launcher == "ray" and is_idle:
        raise ValueError(
            "placement.launcher is 'ray'; it must be local where the trainer is another launcher's "
            "(RANK is set) or its caller's own process, and no engine is to be apart"
        )


def require_release(run: GrpoRun) -> None:
    """Raise ValueError for placement.release_memory=true where memory cannot be released."""
    if run.placement.release_memory:
        releases_memory(run, resolve_device(run.device))


def load_transport(name: str) -> type[WeightSync]:
    """Give the class that placement.transport names, or is: module:Class.

    Raises ValueError for one that cannot be imported or is none.
    """
    path = TRANSPORTS[name].path if name in TRANSPORTS else name
    found = import_named(path, "placement.transport")
    if not (isinstance(found, type) and issubclass(found, WeightSync)):
        raise ValueError(f"placement.transport is {name!r}; give a subclass of Lease or Transport")
    return found


def open_launcher(run: GrpoRun) -> "AbstractContextManager[RayEngines | None]":
    """What starts the engines of a run, where it is not this process: within it they live. The
    first of several processes has it."""
    placement = run.placement
    if placement.launcher == "local" or placement.engine == "colocated" or launched_rank() > 0:
        return nullcontext()
    own_secret()  # taken out of the environment, which Ray's processes inherit
    from samebit.recipes.launch.ray_engines import open_engines

    return open_engines(run)


def start_engine(
    run: GrpoRun,
    device: torch.device,
    trainer: MegatronTrainer,
    releases: bool,
    draft: OnlineDraft | None = None,
    cluster: "RayEngines | None" = None,
) -> tuple[EngineClient, WeightSync]:
    """Start the engine and what keeps it on the trainer's weights; no folder's are loaded.

    Where weights are leased it is made on the trainer's. Any other serves after its first update.
    If it takes turns with the trainer (`releases`), the gradients are released from here on, and
    its KV cache may have most of what is free: the rest is for graphs and a prefill's activations.
    A draft that is trained is written to its folder, and the engine begins with it.
    """
    transport = load_transport(run.placement.transport)
    longest = run.rollout.longest
    own: Any = {"attention": run.numerics.attention, "model_family": run.model_family}
    own |= {"load_format": "none"}
    if draft is not None:
        draft.write()
        own |= {"draft_model": str(draft.folder), "draft_norm_output": None}
    if releases:
        trainer.release_memory(TRAINER_TURN)
        if run.engine.kv_cache_tokens is None:
            own["kv_memory_fraction"] = run.engine.kv_memory_fraction or KV_FRACTION
    if run.engine.releasable is None:
        own["releasable"] = releases
    config = replace(run.engine, max_model_len=longest, seed=run.seed, **own)
    engine: Engine | RemoteEngine | EnginePool | None = None
    if run.placement.engine == "process":
        started: list[RemoteEngine | EnginePool] = []
        parts = run, config, device, cluster
        told((lambda: started.append(_start_apart(*parts))) if is_first() else None)
        engine = next(iter(started), None)
    else:
        where: dict[str, Any] = {"device": device, "ranks": trainer.ranks}
        if issubclass(transport, Lease):
            where |= {"weights": trainer.params, "step": trainer.step}
        engine = Engine(run.model.path, config, **where)
    entry = TRANSPORTS.get(run.placement.transport)
    more: Any = {key: getattr(run.placement, key) for key in (entry.settings if entry else ())}
    weights: WeightSync = transport.between(trainer, engine, run.run_dir / "weight_sync", **more)
    if draft is not None:
        weights = draft.beside(run, weights, engine, transport, more)
    if run.num_processes > 1 and not isinstance(engine, Engine):
        return LedEngine(engine), weights
    assert engine is not None
    if isinstance(engine, Engine) and run.num_processes > 1:
        return ReplicatedEngine(engine, *place(), trainer.ranks.size), weights
    return engine, weights


def _start_apart(
    run: GrpoRun,
    config: EngineConfig,
    device: torch.device,
    cluster: "RayEngines | None",
) -> RemoteEngine | EnginePool:
    """The engine in processes of its own: its replicas, which are watched, of one at least, where
    the transport knows of them. tp_invariant: it has the bits of other numbers of tensor parallel
    ranks, as the trainer's."""
    placement, ranks = run.placement, RankGroup(invariant=run.numerics.tp_invariant)
    size = placement.engine_tensor

    def start(place: int) -> RemoteEngine:
        launch: Launcher = launch_here
        there = engine_device(placement.transport, device, place * size, processes_here(run))
        if cluster is not None:
            there, launch = cluster.device, cluster.launcher(place)
        where: Any = {"device": there, "ranks": ranks, "waits": not placement.has_replicas}
        path = Path(run.model.path).absolute()  # another node may be in another folder
        return RemoteEngine(path, run.cpu_threads, launch, size, config=config, **where)

    if not placement.has_replicas:
        return start(0)
    limits = placement.replica_timeout_s, placement.max_restarts, placement.start_timeout_s
    room = config.max_num_seqs if placement.replicas > 1 else sys.maxsize  # nobody else has any
    return EnginePool(start, placement.replicas, room, *limits)
