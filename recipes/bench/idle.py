"""How much of steady decode steps the GPU has something to run, from torch.profiler.

A kernel that waits counts as running: for memory, for another GPU, or, started early, for the
kernel before it. So this bounds what a faster host could gain, and says nothing of how well the
GPU is used while something is on it.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from samebit.recipes.bench.config import Workload
from samebit.recipes.bench.prompts import PromptSource, sampling_params
from samebit.recipes.bench.timing import timed
from samebit.rollout.engine import Engine

_GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_TOP = 15


class Activity(NamedTuple):
    """Holds one kernel, copy or fill on the GPU; times in microseconds."""

    start: float
    end: float
    name: str


@dataclass(frozen=True)
class IdleTime:
    """Counts from the first activity's start to the last one's end, streams taken together."""

    busy: float
    """With at least one activity, waiting or not."""
    idle: float
    longest_gap: float

    @property
    def idle_share(self) -> float:
        """This is the idle share of the whole window."""
        whole = self.busy + self.idle
        return self.idle / whole if whole else 0.0


def idle_time(intervals: Iterable[tuple[float, float]]) -> IdleTime:
    """Return the idle time of (start, end) intervals in any order, which may overlap."""
    busy = idle = longest = 0.0
    reached: float | None = None
    for start, end in sorted(intervals):
        gap = 0.0 if reached is None else max(0.0, start - reached)
        idle += gap
        longest = max(longest, gap)
        busy += max(0.0, end - (start if reached is None else max(start, reached)))
        reached = end if reached is None else max(reached, end)
    return IdleTime(busy, idle, longest)


def gpu_activities(trace: dict[str, Any]) -> list[Activity]:
    """Return what ran on the GPU, from a Chrome trace of torch.profiler."""
    return [
        Activity(event["ts"], event["ts"] + event["dur"], event["name"])
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in _GPU_CATEGORIES
    ]


def recorded[T](
    warm_up: Callable[[], object], action: Callable[[], T], trace_file: Path
) -> tuple[T, list[Activity]]:
    """Return the action's result and what it had the GPU do; writes the Chrome trace.

    Only GPU activities are recorded, so that the recording slows the host little. The first
    recording takes long to start: it is that of warm_up.
    """
    with profile(activities=[ProfilerActivity.CUDA]):
        warm_up()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = action()
        torch.cuda.synchronize()
    trace_file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace_file))
    activities = gpu_activities(json.loads(trace_file.read_text(errors="replace"), strict=False))
    if not activities:
        raise ValueError(f"{trace_file}: torch.profiler recorded no GPU activity")
    return result, activities


def top_activities(activities: Iterable[Activity], num_steps: int) -> list[dict[str, Any]]:
    """Return the names that take the most time, with calls and microseconds a step."""
    durations: dict[str, list[float]] = defaultdict(list)
    for start, end, name in activities:
        durations[name].append(end - start)
    ordered = sorted(durations.items(), key=lambda item: -sum(item[1]))
    return [
        {"name": name, "calls": len(times) / num_steps, "us": sum(times) / num_steps}
        for name, times in ordered[:_TOP]
    ]


def gpu_times(
    activities: Sequence[Activity], step_ms: float, recorded_ms: float, num_steps: int
) -> dict[str, Any]:
    """Return a step's milliseconds without and while recording, and the GPU's share.

    gpu_busy_ms: at least one activity ran or waited on the GPU. gpu_sum_ms: their durations added,
    so that what overlaps, such as a kernel that is started early and waits, counts twice.
    not_busy_ms: the rest of the step without recording; below zero where recording slowed the
    activities themselves. gaps_ms: between the first activity and the last of the recording.
    """
    found = idle_time((start, end) for start, end, _ in activities)
    busy_ms = found.busy / 1e3 / num_steps
    return {
        "step_ms": step_ms,
        "step_ms_recorded": recorded_ms,
        "gpu_busy_ms": busy_ms,
        "gpu_sum_ms": sum(end - start for start, end, _ in activities) / 1e3 / num_steps,
        "not_busy_ms": step_ms - busy_ms,
        "not_busy_share": (step_ms - busy_ms) / step_ms,
        "gaps_ms": found.idle / 1e3 / num_steps,
        "gaps_share": found.idle_share,
        "longest_gap_us": found.longest_gap,
    }


def describe_gpu_times(found: dict[str, Any]) -> str:
    """Put gpu_times in words."""
    return (
        f"decode step {found['step_ms']:.3f} ms ({found['step_ms_recorded']:.3f} while recorded); "
        f"for {found['gpu_busy_ms']:.3f} ms a kernel, copy or fill is on the GPU, those that wait "
        f"included (durations sum to {found['gpu_sum_ms']:.3f} ms), for "
        f"{found['not_busy_ms']:.3f} ms ({found['not_busy_share']:.1%}) none is; gaps within the "
        f"recording {found['gaps_ms']:.3f} ms ({found['gaps_share']:.1%}), the longest "
        f"{found['longest_gap_us']:.1f} us"
    )


def num_prefill_steps(engine: Engine, workload: Workload) -> int:
    """Return after how many steps every prompt of the workload is computed, and some more."""
    config = engine.config
    budget = config.max_batch_tokens - workload.num_seqs
    if workload.num_seqs > config.max_num_seqs or budget < 1:
        raise ValueError(
            f"profile: {workload} has {workload.num_seqs} samples; engine.max_num_seqs is "
            f"{config.max_num_seqs}, engine.max_batch_tokens {config.max_batch_tokens}: both must "
            "let them all decode in one step"
        )
    total = workload.num_prompts * workload.input_len
    return -(-total // budget) + -(-workload.input_len // config.prefill_chunk) + 4


def _step(engine: Engine, count: int) -> float:
    """Milliseconds of each of `count` steps."""

    def steps() -> None:
        for _ in range(count):
            engine.step()

    return timed(steps, engine.device)[1] * 1e3 / count


def profile_decode(
    engine: Engine, source: PromptSource, workload: Workload, num_steps: int, trace_file: Path
) -> dict[str, Any]:
    """Trace `num_steps` steps with all samples decoding; writes a Chrome trace. See gpu_times."""
    warmup = num_prefill_steps(engine, workload)
    workload = replace(workload, output_len=warmup + 2 * num_steps + 16)
    for prompt, ids in zip(*source.draw(workload), strict=True):
        engine.add_request(prompt, sampling_params(workload), ids)
    _step(engine, warmup)
    step_ms = _step(engine, num_steps)
    recorded_ms, activities = recorded(
        lambda: _step(engine, 2), lambda: _step(engine, num_steps), trace_file
    )
    while engine.has_unfinished_requests:
        engine.step()
    return {
        "trace": trace_file.name,
        "workload": str(workload),
        "steps": num_steps,
        **gpu_times(activities, step_ms, recorded_ms, num_steps),
        "activities": len(activities) / num_steps,
        "top": top_activities(activities, num_steps),
    }
