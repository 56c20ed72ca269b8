"""Where the engine runs and how weights reach it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from samebit.kernels.registry import attention_kind
from samebit.recipes.config import GrpoRun, SftRun
from samebit.recipes.launch.replicas import ReplicatedEngine
from samebit.rollout.engine import Engine
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.runtime.weights import load_safetensors
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import place
from samebit.weight_sync.transports.alias import AliasTransport
from samebit.weight_sync.transports.base import Transport
from samebit.weight_sync.transports.file import FileTransport
from samebit.weight_sync.transports.stages import StageTransport

ServingEngine = Engine | RemoteEngine | ReplicatedEngine
"""What serves the trainer's weights, wherever it runs."""


def load_weights(trainer: MegatronTrainer, model_path: str) -> None:
    """Fill the trainer's parameters from a Hugging Face folder."""
    whole = trainer.model.param_specs()
    trainer.fill(lambda specs, params: load_safetensors(Path(model_path), specs, params, whole))


def make_trainer(
    run: SftRun | GrpoRun, model: ModelConfig, num_updates: int, device: torch.device
) -> MegatronTrainer:
    """Make the trainer that the run asks for, with the weights of its model's folder."""
    settings, numerics = run.trainer, run.numerics
    trainer = MegatronTrainer(
        model,
        settings.optimizer,
        num_updates,
        device,
        settings.parallel,
        numerics.tp_invariant,
        longest=settings.micro_batch_tokens,
        attention=attention_kind(numerics.attention),
    )
    load_weights(trainer, run.model.path)
    return trainer


def _start_copies(
    run: GrpoRun, trainer: MegatronTrainer, engine: Engine
) -> tuple[ReplicatedEngine, Transport]:
    """One of the engines of several processes."""
    transport: Transport
    if run.placement.transport == "stages":
        transport = StageTransport(engine, engine.weights, trainer.pipeline_group)
    else:
        engine.bind_weights(trainer.params, trainer.step)
        transport = AliasTransport(engine)
    return ReplicatedEngine(engine, *place(), trainer.ranks.size), transport


def start_engine(
    run: GrpoRun, device: torch.device, trainer: MegatronTrainer
) -> tuple[ServingEngine, Transport]:
    """Start the engine, with the model folder's weights, and the transport that serves it."""
    longest = run.rollout.max_prompt_len + run.rollout.max_new_tokens
    config = replace(
        run.engine, max_model_len=longest, seed=run.seed, attention=run.numerics.attention
    )
    where: dict[str, Any] = {"device": device, "ranks": trainer.ranks}
    if run.trainer.parallel.num_processes > 1:
        return _start_copies(run, trainer, Engine(run.model.path, config, **where))
    engine: Engine | RemoteEngine
    if run.placement.engine == "process":
        engine = RemoteEngine(run.model.path, run.cpu_threads, config=config, **where)
    else:
        engine = Engine(run.model.path, config, **where)
    if run.placement.transport == "alias":
        assert isinstance(engine, Engine)
        engine.bind_weights(trainer.params, trainer.step)
        return engine, AliasTransport(engine)
    if run.placement.transport == "gloo":
        assert isinstance(engine, RemoteEngine)
        return engine, engine.connect_weights("gloo")
    folder = run.run_dir / "weight_sync"
    return engine, FileTransport(folder, trainer.specs, engine.update_weights_from_disk)
