"""samebit plan: what a GRPO run would take of a cluster, from its configuration alone.

Placement, memory by tag and GPU, what an update of the weights moves, seconds of a step's phases,
and the first thing that does not fit. Of the model's folder config.json is read; nothing is run,
and no GPU is needed. Rates are the cluster's times the shares that committed results reached.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from samebit.recipes.bench.output import format_table
from samebit.recipes.plan_config import PlanRun
from samebit.recipes.planning.layout import Layout
from samebit.recipes.planning.measured import measured
from samebit.recipes.planning.memory import TAGS, plan_memory, releases_memory
from samebit.recipes.planning.remedies import remedies
from samebit.recipes.planning.sync import plan_sync
from samebit.recipes.planning.times import Part, StepModel
from samebit.recipes.run.folder import require_own_report
from samebit.recipes.run.inputs import require_engine
from samebit.recipes.run.secrets import scrubbed
from samebit.recipes.run.waiting_rollouts import HOST_TOKEN_BYTES, PACKED_TOKEN_BYTES
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.registry import load_model_config
from samebit.weight_sync.disk import write_atomically

_GIB = 2**30
PHASES = ("rollout", "train")
NOT_COUNTED = (
    "Every sample counts with its most tokens. Not counted: rewards, evaluation, checkpoints, "
    "refills, and what delta, offload_optimizer, offload_reference and tp_invariant save or cost."
)
PARTIAL = (
    "Of partial rollouts: a step is one stint in a run that is under way, of samples of every age "
    "in equal numbers; who goes on computes its whole context anew and shares no prompt; what is "
    "left is compared with one more forward pass, unless rollout.check_stale=false. That samples "
    "end before their most tokens, which is what partial rollouts are for, is not counted."
)
AHEAD = (
    "Of rollout.max_staleness: a step is one of a run that is under way. Engines draw while the "
    "trainer trains, and compares what older weights drew (unless rollout.check_stale=false, by a "
    "copy of the weights that drew); an update waits until they are idle."
)


def make_plan(run: PlanRun) -> dict[str, Any]:
    """Return the plan as plain values, sizes in bytes and times in seconds.

    Raises OSError or ValueError for a model or a layout that cannot be.
    """
    model, own = load_model_config(run.model.path, run.model_family), measured()
    require_engine(run, model)
    layout = Layout.of(run, model)
    memory = plan_memory(run, model, layout, own)
    sync = plan_sync(run, model, layout, own.links)
    step = StepModel(run, model, layout, own)
    fits = memory.shortage is None
    times = step.times(memory.kv_tokens, sync[0].seconds) if fits else None
    drawn = run.samples_per_step * run.rollout.max_new_tokens
    return {
        "command": "samebit plan",
        "model": Path(run.model.path).resolve().name,
        "cluster": asdict(run.cluster) | asdict(run.cluster.gpu),
        "layout": str(layout.parallel),
        "gpus": layout.num_gpus,
        "idle_gpus": run.cluster.num_gpus - layout.num_gpus,
        "engines": layout.num_engines,
        "placement": layout.to_plain(),
        "memory": _memory(run, layout, model),
        "releases_memory": releases_memory(run),
        "peak_bytes": memory.peak_bytes,
        "fits": fits,
        "shortage": None if memory.shortage is None else asdict(memory.shortage),
        "remedies": [] if fits else remedies(run, model, own, memory),
        "kv_tokens": memory.kv_tokens,
        "samples_at_once": step.at_once(memory.kv_tokens),
        "max_staleness": run.rollout.max_staleness,
        "left": None if run.rollout.partial_tokens is None else _left(run, step.parts),
        "sync": [asdict(plan) for plan in sync],
        "times": None if times is None else asdict(times) | {"step_s": times.step_s},
        "tokens_s": None if times is None else drawn / times.step_s,
        "measured": asdict(own),
    }


def _left(run: PlanRun, parts: Sequence[Part]) -> dict[str, int]:
    """What a step leaves to later ones: in a checkpoint, and in every trainer process's memory,
    which hold as much of each step that waits to be trained."""
    tokens = run.samples_per_step * sum(part.begun + part.drawn for part in parts[:-1])
    kept = tokens * max(1, run.rollout.max_staleness)
    return {
        "stints_of_a_sample": len(parts),
        "most_token_staleness": run.rollout.most_token_staleness,
        "samples": run.samples_per_step * (len(parts) - 1),
        "tokens": tokens,
        "checkpoint_bytes": kept * PACKED_TOKEN_BYTES,
        "host_bytes": kept * HOST_TOKEN_BYTES,
    }


def _memory(run: PlanRun, layout: Layout, model: ModelConfig) -> dict[str, Any]:
    """Bytes by GPU and tag that are resident: in each phase with release, and without."""
    found: dict[str, Any] = {}
    able = run.placement.engine == "colocated" and run.engine.releasable is not False
    for releases in (True, False) if able else (False,):
        changed = replace(run, placement=replace(run.placement, release_memory=releases))
        for gpu in plan_memory(changed, model, layout, measured()).gpus:
            phases = {phase: gpu.resident(phase) for phase in PHASES}
            found.setdefault(gpu.name, {}).update(
                phases if releases else {"without_release": gpu.tags}
            )
    return found


def _placement_table(plan: dict[str, Any]) -> str:
    """One line a node and stage: ranks that are neighbours there are told together."""
    rows = [["node", "GPUs", "ranks", "stage", "engines"]]
    groups: dict[tuple[int, int | None], list[dict[str, Any]]] = {}
    for place in plan["placement"]:
        groups.setdefault((place["node"], place.get("stage")), []).append(place)
    for (node, stage), places in groups.items():
        ranks = [place["rank"] for place in places if "rank" in place]
        engines = sorted({place["engine"] for place in places if "engine" in place})
        texts = (_span([place["gpu"] for place in places]), _span(ranks))
        rows.append([str(node), *texts, "-" if stage is None else str(stage), _span(engines)])
    return format_table(rows)


def _span(numbers: list[int]) -> str:
    if not numbers:
        return "-"
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}-{last}"


def _memory_table(plan: dict[str, Any]) -> str:
    memory: dict[str, dict[str, dict[str, int]]] = plan["memory"]
    every = [tags for rows in memory.values() for tags in rows.values()]
    shown = [tag for tag in TAGS if any(tags[tag] for tags in every)]
    rows = [["GiB of a GPU", *shown, "in all"]]
    for name, phases in memory.items():
        for phase, tags in phases.items():
            sizes = [*(tags[tag] for tag in shown), sum(tags.values())]
            words = f"{name}, {phase.replace('_', ' ')}"
            rows.append([words, *(f"{size / _GIB:,.2f}" for size in sizes)])
    return format_table(rows)


def _sync_table(plan: dict[str, Any]) -> str:
    rows = [["transport", "engine rank GiB", "from others GiB", "over all ranks GiB", "ms"]]
    for i, way in enumerate(plan["sync"]):
        sizes = [f"{way[key] / _GIB:,.3f}" for key in ("held_bytes", "moved_bytes", "all_bytes")]
        ms = "not measured" if way["seconds"] is None else f"{1e3 * way['seconds']:,.1f}"
        rows.append([way["transport"] + (" (the run's)" if i == 0 else ""), *sizes, ms])
    return format_table(rows)


def _times_table(plan: dict[str, Any]) -> str:
    times, gpus = plan["times"], plan["gpus"]
    if times is None:
        return "What does not fit takes no time that could be told."
    phases = ["rollout_wait" if plan["max_staleness"] else "rollout"]
    phases += [*(["compare"] if times["compare_s"] else []), "train", "sync", "step"]
    rows = [["phase", "seconds", "share"]]
    for name in phases:
        seconds = times[f"{name}_s"]
        if seconds is None:
            rows.append([name, "not measured", "-"])
        else:
            rows.append(
                [name.replace("_", " "), f"{seconds:,.3f}", f"{seconds / times['step_s']:.1%}"]
            )
    return (
        f"{format_table(rows)}\n"
        f"{times['rollout_tokens_s']:,.0f} tokens drawn per second of rollout, "
        f"{plan['tokens_s']:,.0f} per second of a step ({plan['tokens_s'] / gpus:,.0f} a GPU); "
        f"{times['mfu']:.1%} MFU while training"
    )


def _left_text(plan: dict[str, Any]) -> str:
    """What partial rollouts leave, and their first step."""
    left, times = plan["left"], plan["times"]
    first = "" if times is None else f" The first rollout takes {times['first_rollout_s']:,.3f} s."
    return (
        f"A sample comes in {left['stints_of_a_sample']} stints at most; a step leaves "
        f"{left['samples']:,} samples of {left['tokens']:,} tokens to later ones: with all steps "
        f"that wait {left['checkpoint_bytes'] / _GIB:,.3f} GiB of a checkpoint, "
        f"{left['host_bytes'] / _GIB:,.3f} GiB of each trainer process on the host. Tokens are at "
        f"most {left['most_token_staleness']} training steps older than what they train.{first}"
    )


def _ahead_text(plan: dict[str, Any]) -> str:
    """How long engines draw of a step, and how much of that beside training."""
    if (times := plan["times"]) is None:
        return "What does not fit draws nothing ahead."
    beside = 1 - times["rollout_wait_s"] / times["rollout_s"]
    busy = times["rollout_s"] / times["step_s"]
    return (
        f"Engines draw for {times['rollout_s']:,.3f} s of a step, {busy:.1%} of it; for "
        f"{beside:.1%} of that time the trainer has something to do."
    )


def verdict(plan: dict[str, Any]) -> str:
    """Say whether the plan fits; if not, what does not, by how much, and what would help."""
    short, total = plan["shortage"], plan["cluster"]["gpu_gib"]
    if short is None:
        how = "with" if plan["releases_memory"] else "without"
        peak = plan["peak_bytes"] / _GIB
        return f"It fits: at most {peak:,.1f} of {total:,.1f} GiB of a GPU, {how} release."
    return (
        f"It does not fit ({short['gpu']}, {short['phase']}): {short['tag']} lacks "
        f"{short['num_bytes'] / _GIB:,.2f} GiB; a GPU has {total:,.1f}, the run would take "
        f"{plan['peak_bytes'] / _GIB:,.1f}. What would fit: {'; or '.join(plan['remedies'])}."
    )


def summary(plan: dict[str, Any]) -> str:
    """The plan as tables."""
    idle = f", {plan['idle_gpus']} idle" if plan["idle_gpus"] else ""
    own = [] if plan["left"] is None else [_left_text(plan), PARTIAL]
    own += [_ahead_text(plan), AHEAD] if plan["max_staleness"] else []
    return "\n\n".join(
        [
            f"{plan['model']}: {plan['layout']} on {plan['gpus']} GPUs{idle}; {plan['engines']} "
            f"engines, each with a KV cache of {plan['kv_tokens']:,} tokens, for "
            f"{plan['samples_at_once']:,} samples at a time",
            _placement_table(plan),
            _memory_table(plan),
            _sync_table(plan),
            _times_table(plan),
            *own,
            NOT_COUNTED,
            verdict(plan),
        ]
    )


def main(run: PlanRun) -> int:
    """The command `samebit plan`; 1 if the run does not fit."""
    if run.output is not None:
        require_own_report(Path(run.output), "output")
    plan = make_plan(run)
    print(scrubbed(summary(plan), run))
    if run.output is not None:
        file = Path(run.output)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(plan, indent=1) + "\n")
        print(f"{file} holds the plan.")
    return 0 if plan["fits"] else 1
