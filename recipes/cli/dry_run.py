"""What dry_run prints of a training run, from its configuration alone: nothing is allocated."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from samebit.recipes.config import DpoRun, GrpoRun, SftRun
from samebit.recipes.data.records import Split
from samebit.recipes.eagle3_config import Eagle3Run, TrainingRun
from samebit.recipes.launch.ranks import require_gpus
from samebit.recipes.launch.ray_package import is_on_gpu
from samebit.recipes.run.inputs import Eagle3Inputs, GrpoInputs, SftInputs
from samebit.recipes.run.secrets import to_yaml
from samebit.recipes.run.session import require_resumable, require_startable
from samebit.recipes.run.waiting_rollouts import HOST_TOKEN_BYTES, PACKED_TOKEN_BYTES
from samebit.rollout.device import resolve_device, resolve_dtype
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.draft.config import DraftConfig
from samebit.rollout.models.registry import load_stop_tokens
from samebit.rollout.speculative.making import open_speculation
from samebit.trainer.algorithms.registry import make_algorithm
from samebit.trainer.config import ParallelConfig, TrainerConfig
from samebit.trainer.critic.value_model import value_model_of
from samebit.trainer.megatron.models.adapter import layer_of
from samebit.trainer.megatron.stages import make_stage
from samebit.trainer.megatron.streams import made_by
from samebit.trainer.ranks import is_first
from samebit.weight_sync.mapping import hf_shapes
from samebit.weight_sync.transports.registry import TRANSPORTS

_MIB = 1 << 20


def _num_parameters(model: ModelConfig | DraftConfig) -> int:
    return sum(math.prod(shape) for shape in hf_shapes(model.param_specs()).values())


def _memory(
    model: ModelConfig | DraftConfig, device_type: str, trainer: TrainerConfig, segments: int = 0
) -> dict[str, Any]:
    """MiB of a process by use. AdamW keeps two fp32 moments, bf16 weights also an fp32 master copy.

    Stages and tensor ranks count as equal; the first and last stage have more. Of `segments` of
    gradients (0: none) the sums count that wait for others.
    """
    whole, parallel = _num_parameters(model), trainer.parallel
    parameters = math.ceil(whole / (parallel.tensor * parallel.pipeline))
    copies = parallel.data * parallel.context if parallel.distributed_optimizer else 1
    weight_bytes = 4 if device_type == "cpu" else 2
    master_bytes = 0 if device_type == "cpu" else 4
    place = "on_host_" if parallel.offload_optimizer else ""
    weights, optimizer = parameters * weight_bytes, parameters * (8 + master_bytes) / copies
    checkpoint = weights + optimizer if trainer.background_checkpoints else 0
    waiting = (segments // parallel.data).bit_length() - 1
    host = "on_host_" if parallel.offload_segment_sums else ""
    sums = {f"segment_sums_{host}mib": round(waiting * parameters * 4 / _MIB, 1)}
    return {
        "processes": parallel.num_processes,
        "parameters": whole,
        "weights_mib": round(weights / _MIB, 1),
        "gradients_mib": round(parameters * 4 / _MIB, 1),
        **(sums if segments else {}),
        f"optimizer_{place}mib": round(optimizer / _MIB, 1),
        "checkpoint_on_host_mib": round(checkpoint / _MIB, 1),
    }


def _counts(run: TrainingRun, splits: Mapping[str, Split]) -> dict[str, int]:
    """Numbers of records, and of those that the policy for overlong ones has changed."""
    counts = {f"{name}_records": len(split) for name, split in splits.items()}
    for name, split in splits.items():
        counts |= {f"{name}_records_of_source_{i}": size for i, size in enumerate(split.sizes)}
        if run.data.overlong_prompts == "drop":
            counts[f"{name}_records_dropped"] = split.num_dropped
        elif run.data.overlong_prompts == "truncate_left":
            counts[f"{name}_prompts_cut"] = split.num_cut
    return counts


def describe_grpo(run: GrpoRun) -> dict[str, Any]:
    """The batch arithmetic and a memory estimate; every record is read and checked."""
    inputs = GrpoInputs(run)
    inputs.close()
    require_resumable(run, inputs.records)
    model = inputs.model
    resolved = resolve_device(run.device)
    device = resolved.type
    memory = _memory(model, device, run.trainer, run.numerics.grad_segments)
    others = _other_models(run, inputs, device)
    longest = run.rollout.longest
    most_samples = run.rollout.most_prompts_per_step * run.rollout.samples_per_prompt
    at_once = max(len(run.rollout.places_of(refill)) for refill in (0, 1))
    at_once *= run.rollout.samples_per_prompt * run.rollout.most_stints
    draft = _draft_of(run, inputs)
    apart = run.placement.engine == "process"
    engine_ranks = run.placement.engine_tensor if apart else run.trainer.parallel.tensor
    drafts = [] if draft is None else [draft.kv_layout] * engine_ranks
    dtype = resolve_dtype(None, resolved)
    kv_bytes = sum(layout.bytes_per_token(dtype) for layout in (model.kv_layout, *drafts))
    algorithm = make_algorithm(run.algorithm)
    reference = memory["weights_mib"] if algorithm.has_reference else 0
    saved = memory["checkpoint_on_host_mib"] + others.pop("critic_checkpoint_on_host_mib", 0)
    saved += reference if run.trainer.background_checkpoints else 0
    memory["checkpoint_on_host_mib"] = round(saved, 1)
    return {
        "logprobs": _logprobs(run),
        "device": device,
        **_ray_places(run),
        **_counts(run, {"train": inputs.train_set, "held_out": inputs.eval_set}),
        "samples_per_step": run.samples_per_step,
        "optimizer_steps_per_step": run.updates_per_step,
        "optimizer_steps": run.num_updates,
        "most_prompts_per_step": run.rollout.most_prompts_per_step,
        "most_tokens_per_step": most_samples * longest,
        **memory,
        **others,
        **_engines_apart(run, model, dtype.itemsize),
        **_reference(run.trainer, reference),
        **_staleness(run, memory["weights_mib"]),
        **_partial(run, at_once),
        **_online_draft(run, model, draft, device),
        "kv_mib_if_all_run_at_once": round(
            min(at_once, run.engine.max_num_seqs) * longest * kv_bytes / _MIB, 1
        ),
    }


def _engines_apart(run: GrpoRun, model: ModelConfig, width: int) -> dict[str, int | float]:
    """How many processes engines apart have, if there are any, and each one's MiB of weights.

    width: bytes of a number.
    """
    if not (count := run.placement.num_engine_processes):
        return {}
    own = _num_parameters(model) * width / run.placement.engine_tensor
    return {"engine_processes": count, "engine_weights_mib": round(own / _MIB, 1)}


def _ray_places(run: GrpoRun) -> dict[str, Any]:
    """What is asked of Ray, if it is to start the processes, and what the cluster has, which is
    joined for it. Raises RayError if it cannot be, and ValueError for a transport between GPUs
    where it has none."""
    placement = run.placement
    if placement.launcher == "local":
        return {}
    count, resources = run.num_processes + placement.num_engine_processes, None
    on_gpu = resolve_device(run.device).type == "cuda"
    if placement.ray_address is None:
        require_gpus(run, count)
    else:
        from samebit.recipes.launch.ray_cluster import resources_at

        resources = resources_at(placement.ray_address)
        on_gpu = is_on_gpu(run.device, resources)
        name = placement.transport
        if name in TRANSPORTS and TRANSPORTS[name].gpus and not on_gpu:
            raise ValueError(f"placement.transport is {name!r}; it needs GPUs, which Ray has not")
    kind, amount = ("GPU", count) if on_gpu else ("CPU", count * run.cpu_threads)
    has = {} if resources is None else {"ray_has": f"{resources.get(kind, 0):g} {kind}"}
    return {"ray_processes": count, "ray_needs": f"{amount} {kind}", **has}


def _reference(trainer: TrainerConfig, mib: float) -> dict[str, float]:
    """The MiB of a reference, by where it is kept."""
    place = "on_host_" if trainer.parallel.offload_reference else ""
    return {f"reference_{place}mib": mib}


def _staleness(run: GrpoRun, weights_mib: float) -> dict[str, int | float | str]:
    """Which weights draw which step, if not those before it, and what the comparison takes."""
    stale, every = run.rollout.max_staleness, run.rollout.weight_sync_steps
    if not stale:
        return {}
    drawn = f"max(0, s - {1 + stale})"
    drawn += f", or the next multiple of {every}" if every > 1 else ""
    copies = weights_mib if run.rollout.check_stale else 0
    return {"step_s_is_drawn_after": drawn, "served_copy_mib": copies}


def _partial(run: GrpoRun, at_once: int) -> dict[str, int | float]:
    """How often a sample goes on, by how many steps its tokens may be older than what they train,
    how many may be under way, and what a step may leave, at most, if they are drawn in stints; of
    steps that wait each has what it leaves."""
    rollout = run.rollout
    if rollout.partial_tokens is None:
        return {}
    left = rollout.most_prompts_left * rollout.samples_per_prompt
    tokens = left * rollout.max_new_tokens * max(1, rollout.max_staleness)
    return {
        "stints_of_a_sample": rollout.most_stints,
        "most_token_staleness": rollout.most_token_staleness,
        "most_samples_at_once": at_once,
        "most_samples_left": left,
        "left_in_checkpoint_mib": round(tokens * PACKED_TOKEN_BYTES / _MIB, 1),
        "left_on_host_mib": round(tokens * HOST_TOKEN_BYTES / _MIB, 1),
    }


def _draft_of(run: GrpoRun, inputs: GrpoInputs) -> DraftConfig | None:
    """Of the draft that guesses, trained or not; None if none does."""
    if inputs.draft is not None:
        return inputs.draft[1]
    folder = open_speculation(run.engine, inputs.model)
    return None if folder is None else folder.config


def _online_draft(
    run: GrpoRun, model: ModelConfig, draft: DraftConfig | None, device_type: str
) -> dict[str, int | float | str]:
    """Figures of the draft that the run trains, if it does, beside its target's."""
    if draft is None or not run.draft.is_online:
        return {}
    parameters = _num_parameters(draft)
    weights, masters = (4, 0) if device_type == "cpu" else (2, 4)  # fp32 weights are their own
    return {
        "draft_optimizer_steps": run.num_draft_updates,
        "draft_parameters": parameters,
        "draft_vocabulary": draft.draft_vocab_size,
        "draft_captured_layers": ", ".join(map(str, draft.captured_layers)),
        "draft_mib": round(parameters * (weights + masters + 12) / _MIB, 1),  # sums, two moments
        **_draft_of_stages(run, model, draft, weights),
    }


def _draft_of_stages(
    run: GrpoRun, model: ModelConfig, draft: DraftConfig, width: int
) -> dict[str, float]:
    """MiB at most that a stage of a pipeline, if there is one, keeps for a draft in training: the
    streams of an optimizer step; copies of what the target has outside of its layers.

    width: bytes of a number.
    """
    parallel = run.trainer.parallel
    if parallel.pipeline == 1:
        return {}
    stage = make_stage(model, 0, parallel.pipeline, parallel.virtual_pipeline)
    streams = {*draft.captured_layers, model.num_layers}
    owners = Counter(stage.owner_of(made_by(layer)) for layer in streams)
    tokens = run.batch_size * run.rollout.longest / (parallel.data * parallel.context)
    kept = tokens * max(owners.values()) * draft.target_hidden_size * width
    outer = [spec for spec in model.param_specs() if layer_of(spec.name) is None]
    copies = sum(math.prod(spec.shape) for spec in outer) / parallel.tensor * width
    return {
        "draft_kept_streams_mib": round(kept / _MIB, 1),
        "draft_target_copies_mib": round(copies / _MIB, 1),
    }


def _other_models(run: GrpoRun, inputs: GrpoInputs, device_type: str) -> dict[str, Any]:
    """MiB of a process by use of the critic and the teacher, where there are any."""
    found = {}
    if inputs.critic is not None:
        critic = replace(run.trainer, parallel=run.critic_parallel)
        memory = _memory(value_model_of(inputs.critic), device_type, critic)
        found = {f"critic_{name}": x for name, x in memory.items() if name != "processes"}
        found["critic_layout"] = str(run.critic_parallel)
    if inputs.teacher is not None:
        engine = TrainerConfig(parallel=ParallelConfig(tensor=run.trainer.parallel.tensor))
        found["teacher_mib"] = _memory(inputs.teacher, device_type, engine)["weights_mib"]
    if top_k := make_algorithm(run.algorithm).teacher_top_k:
        tokens = run.samples_per_step * run.rollout.max_new_tokens
        found["teacher_top_on_host_mib"] = round(tokens * (8 * top_k + 4) / _MIB, 1)
    return found


def _logprobs(run: GrpoRun) -> str:
    """Of which policy log-probs, ratios, entropies and KL are, in words."""
    if run.rollout.truncates:
        sets = "of what may be drawn: top_p, top_k, min_p"
        later = run.updates_per_step > 1 or make_algorithm(run.algorithm).needs_reference
        return sets + (", known from one more forward pass of later steps" if later else "")
    if run.rollout.limits:
        return (
            "of the full softmax, although top_p, top_k or min_p draw from a part of it, so that "
            "gradients are biased; rollout.logprobs=truncated counts that part alone"
        )
    return "of the full softmax, which draws"


def describe_sft(run: SftRun) -> dict[str, Any]:
    """The batch arithmetic and a memory estimate; every record is read and checked."""
    inputs = SftInputs(run)
    require_resumable(run, inputs.records)
    device = resolve_device(run.device).type
    return {
        "device": device,
        **_counts(run, {"train": inputs.train_set}),
        "samples_per_step": run.trainer.batch_size,
        "optimizer_steps": run.trainer.num_steps,
        **_memory(inputs.model, device, run.trainer, run.numerics.grad_segments),
    }


def describe_dpo(run: DpoRun) -> dict[str, Any]:
    """As describe_sft; a step's samples are pairs, and the reference is one more copy."""
    figures = describe_sft(run)
    figures["pairs_per_step"] = figures.pop("samples_per_step")
    if run.trainer.background_checkpoints:
        figures["checkpoint_on_host_mib"] += figures["weights_mib"]
    return figures | _reference(run.trainer, figures["weights_mib"])


def describe_eagle3(run: Eagle3Run) -> dict[str, Any]:
    """The batch arithmetic and a memory estimate; every record and the draft's headers are read."""
    inputs = Eagle3Inputs(run)
    require_resumable(run, inputs.records)
    resolved, model, config = resolve_device(run.device), inputs.model, inputs.config
    samples = run.rollout.prompts_per_step * run.rollout.samples_per_prompt
    width = resolve_dtype(None, resolved).itemsize
    streams = len({*config.captured_layers, model.num_layers}) * config.target_hidden_size
    most_tokens = run.trainer.micro_batch_tokens
    return {
        "device": resolved.type,
        **_counts(run, {"train": inputs.train_set, "held_out": inputs.eval_set}),
        "samples_per_step": samples,
        "optimizer_steps": run.trainer.num_steps,
        "most_tokens_per_step": samples * run.rollout.longest,
        "draft_vocabulary": config.draft_vocab_size,
        "captured_layers": ", ".join(map(str, config.captured_layers)),
        "target_mib": round(_num_parameters(model) * width / _MIB, 1),
        **_memory(config, resolved.type, run.trainer),
        "streams_mib": round(most_tokens * streams * width / _MIB, 1),
    }


def print_description(run: TrainingRun, figures: Mapping[str, Any]) -> None:
    """Print the configuration as YAML, what ends a completion, then one figure a line."""
    print(to_yaml(run))
    print(f"stop tokens: {load_stop_tokens(run.model.path)}")
    for name, value in figures.items():
        print(f"{name:28s} {value:,}" if isinstance(value, int | float) else f"{name:28s} {value}")


def train_or_describe[R: (GrpoRun, SftRun, DpoRun, Eagle3Run)](
    run: R, train: Callable[[R], dict[str, Any]], describe: Callable[[R], dict[str, Any]]
) -> int:
    """Run a training command, which prints its summary or, with dry_run, what the run would be."""
    if run.dry_run:
        require_startable(run)
        print_description(run, describe(run))
        return 0
    summary = train(run)
    if is_first():
        print(json.dumps(summary))
    return 0
