"""What every tag takes of a GPU, phase by phase, and the first that does not fit."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from samebit.recipes.launch.placement import KV_FRACTION
from samebit.recipes.plan_config import PlanRun
from samebit.recipes.planning.layout import Layout
from samebit.recipes.planning.measured import Measured, product_bytes
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.algorithms.registry import make_algorithm
from samebit.trainer.megatron.stages import Stage, stage_specs
from samebit.weight_sync.mapping import ParamSpec

RUNTIME_BYTES = 2 << 30
"""Of CUDA, NCCL and loaded kernels: h200_step_qwen3_1.7b.json, device less reserved memory."""
TAGS = (
    "runtime", "weights", "reference", "served_weights", "delta_base", "optimizer", "gradients",
    "kv_cache", "cuda_graphs", "activations",
)  # fmt: skip
"""In the order in which a run comes to need them."""
_AWAY = {"rollout": ("gradients",), "train": ("kv_cache", "cuda_graphs")}
_IDLE = {"rollout": ("activations",), "train": ()}


@dataclass(frozen=True)
class GpuMemory:
    """Holds the bytes by tag of one kind of GPU: of a stage's ranks, or of an engine apart."""

    name: str
    tags: dict[str, int]
    releases: bool

    def resident(self, phase: str) -> dict[str, int]:
        """Bytes by tag while samples are drawn (`rollout`) or trained on (`train`)."""
        away = (_AWAY[phase] if self.releases else ()) + _IDLE[phase]
        return {tag: 0 if tag in away else size for tag, size in self.tags.items()}


@dataclass(frozen=True)
class Shortage:
    """Names the first tag that finds too little memory, where and when, and by how much."""

    gpu: str
    phase: str
    tag: str
    num_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Holds what the GPUs of a run take."""

    gpus: tuple[GpuMemory, ...]
    kv_tokens: int
    """An engine's KV cache holds so many."""
    shortage: Shortage | None

    @property
    def peak_bytes(self) -> int:
        """The most that any GPU holds at once."""
        return max(sum(g.resident(phase).values()) for g in self.gpus for phase in _AWAY)


def releases_memory(run: PlanRun) -> bool:
    """Whether engine and trainer take turns, as recipes/launch/placement.py decides on a GPU."""
    wanted = run.placement.release_memory
    colocated = run.placement.engine == "colocated"
    return colocated and run.engine.releasable is not False if wanted is None else wanted


def plan_memory(run: PlanRun, model: ModelConfig, layout: Layout, measured: Measured) -> MemoryPlan:
    """Bytes by tag of every kind of GPU."""
    trainers = {
        "trainer" if len(layout.stages(model)) == 1 else f"stage {stage.index}": _trainer_tags(
            run, model, layout, stage, measured
        )
        for stage in layout.stages(model)
    }
    every = dict(trainers)
    if layout.engines_apart:
        every["engine"] = dict.fromkeys(TAGS, 0) | {"runtime": RUNTIME_BYTES}
    elif run.placement.engine == "process":
        every["trainer"]["runtime"] *= 1 + run.placement.num_engine_processes
    with_engine = ["engine"] if layout.engines_apart else list(trainers)
    if run.placement.transport != "alias":  # engines then have weights of their own
        whole = _num_elements(model.param_specs((0, layout.engine_tensor)))
        for name in with_engine:
            every[name]["weights"] += 2 * whole
    releases, total = releases_memory(run), int(layout.cluster.gpu.gpu_gib * 2**30)
    token_bytes = model.kv_layout.bytes_per_token(torch.bfloat16) // layout.engine_tensor
    free = min(total - _before_engine(every[name], releases) for name in with_engine)
    tokens = _kv_tokens(run, max(free, 0), token_bytes, releases)
    for name in with_engine:
        every[name]["kv_cache"] = tokens * token_bytes
        every[name]["cuda_graphs"] = _graph_bytes(run, model, measured)
    gpus = tuple(GpuMemory(name, tags, releases) for name, tags in every.items())
    least = -(-run.rollout.longest // run.engine.page_size) * run.engine.page_size
    short = next((s for gpu in gpus for s in _shortages(gpu, total)), None)
    if tokens < least and (short is None or TAGS.index(short.tag) > TAGS.index("kv_cache")):
        short = Shortage(with_engine[0], "rollout", "kv_cache", (least - tokens) * token_bytes)
    return MemoryPlan(gpus, tokens, short)


def _num_elements(specs: Iterable[ParamSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs)


def _trainer_tags(
    run: PlanRun, model: ModelConfig, layout: Layout, stage: Stage, measured: Measured
) -> dict[str, int]:
    """As Megatron keeps them for bf16 weights: fp32 gradients, fp32 masters and two moments."""
    parallel = layout.parallel
    elements = _num_elements(stage_specs(model, (0, parallel.tensor), stage))
    waiting = (run.numerics.grad_segments // parallel.data).bit_length() - 1
    sums = 1 + (0 if parallel.offload_segment_sums else max(waiting, 0))
    copies = parallel.data * parallel.context if parallel.distributed_optimizer else 1
    reference = 2 * elements * make_algorithm(run.algorithm).has_reference
    keeps_served = run.rollout.max_staleness > 0 and run.rollout.check_stale
    passing = reference if parallel.offload_reference else 0  # before there are activations
    return dict.fromkeys(TAGS, 0) | {
        "runtime": RUNTIME_BYTES,
        "weights": 2 * elements,
        "reference": reference - passing,
        "served_weights": 2 * elements * keeps_served,
        "delta_base": 2 * elements * run.placement.delta,
        "optimizer": 0 if parallel.offload_optimizer else -(-12 * elements // copies),
        "gradients": 4 * elements * sums,
        "activations": max(activation_bytes(run, model, stage, measured), passing),
    }


def activation_bytes(run: PlanRun, model: ModelConfig, stage: Stage, measured: Measured) -> int:
    """An estimate of what a stage's micro-batches in flight keep for the backward, and its work.

    Of the products the operands and results count; what else is kept goes with them.
    """
    parallel, factor = run.trainer.parallel, measured.training.activation_bytes_per_product_byte
    kept = product_bytes(model)
    if parallel.recompute == "selective":
        kept -= 2 * (model.layer_products["gate_up"].n + model.layer_products["down"].k)
    elif parallel.recompute == "full":
        kept = 2 * model.hidden_size
    whole = 0 if parallel.sequence or parallel.recompute == "full" else 8 * model.hidden_size
    split = 1 if parallel.recompute == "full" and not parallel.sequence else parallel.tensor
    per_layer = whole + max(kept - whole, 0) / split
    again = 0 if parallel.recompute == "none" else product_bytes(model) / parallel.tensor
    tokens = run.trainer.micro_batch_tokens / parallel.context
    layers = stage.num_layers * stage.num_chunks * (stage.count - stage.index)
    return math.ceil(factor * tokens * (layers * per_layer + again))


def _before_engine(tags: dict[str, int], releases: bool) -> int:
    """Bytes that are resident when an engine sizes its KV cache."""
    away = ("kv_cache", "cuda_graphs", "activations", *(("gradients",) if releases else ()))
    return sum(size for tag, size in tags.items() if tag not in away)


def _kv_tokens(run: PlanRun, free: int, token_bytes: int, releases: bool) -> int:
    """As the engine decides (rollout/engine.py), in whole pages."""
    engine, page = run.engine, run.engine.page_size
    if (tokens := engine.kv_cache_tokens) is None:
        fraction = engine.kv_memory_fraction or (KV_FRACTION if releases else 0.5)
        wanted = engine.max_num_seqs * run.rollout.longest
        tokens = max(page, min(int(free * fraction) // token_bytes, wanted))
    return tokens // page * page


def _graph_bytes(run: PlanRun, model: ModelConfig, measured: Measured) -> int:
    if run.engine.cuda_graphs is False:
        return 0
    logits = run.engine.max_num_seqs * model.vocab_size * 4
    return int(measured.rollout.graph_bytes_per_logit_byte * logits)


def _shortages(gpu: GpuMemory, total: int) -> Iterable[Shortage]:
    """In each phase the tag with which the sum first exceeds the memory."""
    for phase in _AWAY:
        taken, resident = 0, gpu.resident(phase)
        for tag in TAGS:
            taken += resident[tag]
            if taken > total:
                yield Shortage(gpu.name, phase, tag, taken - total)
                break
