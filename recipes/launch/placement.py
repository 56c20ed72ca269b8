"""Where the engine runs and how weights reach it."""

from pathlib import Path

import torch

from samebit.recipes.config import GrpoRun, SftRun
from samebit.recipes.launch.replicas import ReplicatedEngine
from samebit.rollout.engine import Engine
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import param_specs
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
    whole = param_specs(trainer.model)
    trainer.fill(lambda specs, params: load_safetensors(Path(model_path), specs, params, whole))


def make_trainer(
    run: SftRun | GrpoRun, model: ModelConfig, num_updates: int, device: torch.device
) -> MegatronTrainer:
    """Make the trainer that the run asks for, with the weights of its model's folder."""
    settings, invariant = run.trainer, run.numerics.tp_invariant
    trainer = MegatronTrainer(
        model,
        settings.optimizer,
        num_updates,
        device,
        settings.parallel,
        invariant,
        longest=settings.micro_batch_tokens,
    )
    load_weights(trainer, run.model.path)
    return trainer


def _start_copies(
    run: GrpoRun, trainer: MegatronTrainer, engine: Engine
) -> tuple[ReplicatedEngine, Transport]:
    """One of the engines of several processes."""
    transport: Transport
    if run.engine.transport == "stages":
        transport = StageTransport(engine, engine.weights, trainer.pipeline_group)
    else:
        engine.bind_weights(trainer.params, trainer.step)
        transport = AliasTransport(engine)
    return ReplicatedEngine(engine, *place(), trainer.ranks.size), transport


def start_engine(
    run: GrpoRun, device: torch.device, trainer: MegatronTrainer
) -> tuple[ServingEngine, Transport]:
    """Start the engine, with the model folder's weights, and the transport that serves it."""
    section = run.engine
    settings = {
        "device": device,
        "page_size": section.page_size,
        "kv_cache_tokens": section.kv_cache_tokens,
        "max_batch_tokens": section.max_batch_tokens,
        "max_num_seqs": section.max_num_seqs,
        "prefill_chunk": section.prefill_chunk,
        "prefix_cache": section.prefix_cache,
        "cuda_graphs": section.cuda_graphs,
        "overlap": section.overlap,
        "max_model_len": run.rollout.max_prompt_len + run.rollout.max_new_tokens,
        "seed": run.seed,
        "ranks": trainer.ranks,
    }
    if run.trainer.parallel.num_processes > 1:
        return _start_copies(run, trainer, Engine(run.model.path, **settings))
    engine: Engine | RemoteEngine
    if section.placement == "process":
        engine = RemoteEngine(run.model.path, cpu_threads=run.cpu_threads, **settings)
    else:
        engine = Engine(run.model.path, **settings)
    if section.transport == "alias":
        assert isinstance(engine, Engine)
        engine.bind_weights(trainer.params, trainer.step)
        return engine, AliasTransport(engine)
    if section.transport == "gloo":
        assert isinstance(engine, RemoteEngine)
        return engine, engine.connect_weights("gloo")
    folder = run.run_dir / "weight_sync"
    return engine, FileTransport(folder, trainer.specs, engine.update_weights_from_disk)
