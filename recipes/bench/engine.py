"""samebit bench engine: output tokens per second of whole workloads, start-up and idle time.

Random prompts, temperature 1, log-probs returned, end-of-sequence ignored. A workload runs once to
warm up and then `repeats` times, always with fresh prompts; median and spread are reported.
"""

import gc
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from samebit.kernels.profile import numerics_profile
from samebit.recipes.bench.config import BenchEngineRun, Workload
from samebit.recipes.bench.idle import profile_decode
from samebit.recipes.bench.output import REPORT_FILE, BenchError, format_table, write_report
from samebit.recipes.bench.prompts import PromptSource, sampling_params
from samebit.recipes.bench.roofline import CARD, ENGINES, peers_tokens_s, roofline_tokens_s
from samebit.recipes.bench.timing import Spread
from samebit.recipes.bench.variants import NOTES, SETTINGS, kernels_of
from samebit.recipes.run_folder import require_own_report
from samebit.rollout.config import DeviceError, resolve_device
from samebit.rollout.engine import Engine

_FIRST = Workload(num_prompts=1, num_samples=1, input_len=16, output_len=1)


def timed_run(engine: Engine, source: PromptSource, workload: Workload) -> float:
    """Seconds of one run with fresh prompts; BenchError unless every token and log-prob came."""
    prompts, sample_ids = source.draw(workload)
    params = sampling_params(workload)
    start = time.perf_counter()
    groups = engine.generate(prompts, params, sample_ids)
    seconds = time.perf_counter() - start
    counts = [(len(c.token_ids), len(c.logprobs)) for group in groups for c in group]
    if counts != [(workload.output_len, workload.output_len)] * workload.num_seqs:
        raise BenchError(f"{workload}: the engine returned other numbers of tokens: {set(counts)}")
    return seconds


def measure(
    engine: Engine, source: PromptSource, workload: Workload, repeats: int
) -> dict[str, Any]:
    """One warm-up and `repeats` timed runs."""
    timed_run(engine, source, workload)
    seconds = [timed_run(engine, source, workload) for _ in range(repeats)]
    return {
        "output_tokens_s": asdict(Spread.of([workload.output_tokens / s for s in seconds])),
        "seconds": seconds,
        "output_tokens": workload.output_tokens,
        "input_tokens": workload.num_prompts * workload.input_len,
    }


def engine_settings(run: BenchEngineRun, variant: str) -> dict[str, Any]:
    """Arguments of Engine; ValueError for one that this engine does not have."""
    settings = run.engine.given() | SETTINGS.get(variant, {})
    unknown = sorted(settings.keys() - inspect.signature(Engine).parameters.keys())
    if unknown:
        raise ValueError(f"variant {variant}: this engine has no setting {', '.join(unknown)}")
    return settings


def start_engine(
    run: BenchEngineRun, variant: str, device: torch.device
) -> tuple[Engine, PromptSource, dict[str, float]]:
    """A new engine, and the seconds until it was there and until it had given its first token."""
    settings = engine_settings(run, variant)
    begin = time.perf_counter()
    engine = Engine(
        run.model, device=device, load_format=run.load_format, seed=run.seed, **settings
    )
    there = time.perf_counter()
    source = PromptSource(engine.model_config.vocab_size, run.seed)
    timed_run(engine, source, _FIRST)
    return engine, source, {"start_s": there - begin, "first_token_s": time.perf_counter() - begin}


def compared(engine: Engine, workload: Workload, device: torch.device) -> dict[str, Any]:
    """Roofline and other engines' figures, where they are of this card."""
    if device.type != "cuda" or CARD not in torch.cuda.get_device_name(device):
        return {}
    return {
        "roofline_tokens_s": roofline_tokens_s(engine.model_config, workload),
        "peers_tokens_s": peers_tokens_s(engine.config.model_path.resolve().name, workload),
    }


def measure_variant(
    run: BenchEngineRun,
    variant: str,
    device: torch.device,
    entry: dict[str, Any],
    save: Callable[[], object],
) -> None:
    """Fill the report's `entry` with every workload on one engine, saving after each."""
    with kernels_of(variant, device.type) as calls:
        engine, source, entry["start"] = start_engine(run, variant, device)
        if calls is not None and not calls.count:
            raise BenchError(f"variant {variant}: the engine does not use what it replaces")
        print(f"{variant}: " + " ".join(f"{k} {v:.1f}" for k, v in entry["start"].items()))
        entry["workloads"] = {}
        for workload in map(Workload.parse, run.workloads):
            found = measure(engine, source, workload, run.repeats)
            entry["workloads"][str(workload)] = found | compared(engine, workload, device)
            rate = found["output_tokens_s"]["median"]
            print(f"{variant}: {workload} {rate:,.1f} tok/s", flush=True)
            save()
        if (graphs := engine.runner.graphs) is not None:
            entry["graphs"] = {
                "count": graphs.num_graphs,
                "capture_s": graphs.capture_s,
                "memory_bytes": graphs.memory_bytes,
            }
            save()
        if run.profile:
            workload = Workload.parse(run.workloads[0])
            name = "trace.json" if variant == "default" else f"trace_{variant}.json"
            path = run.run_dir / name
            entry["profile"] = profile_decode(engine, source, workload, run.profile_steps, path)
            save()
        engine.close()


def _against(rate: float, other: float | None) -> str:
    return f"{other:,.0f} (x{rate / other:.2f})" if other else "-"


def _rows(variants: dict[str, Any]) -> list[list[str]]:
    """The table: one line for each variant and workload; (x1.10): ours is 1.10 times that."""
    lines = [(v, w, found) for v, e in variants.items() for w, found in e["workloads"].items()]
    peers = [e for e in ENGINES if any(e in f.get("peers_tokens_s", {}) for _, _, f in lines)]
    bound = ["roofline"] if any("roofline_tokens_s" in f for _, _, f in lines) else []
    default = variants.get("default", {}).get("workloads", {})
    header = ["variant", "workload", "tok/s", "min", "max", "seconds", "x default"]
    rows = [[*header, *bound, *peers]]
    for variant, workload, found in lines:
        rates = found["output_tokens_s"]
        rate = rates["median"]
        row = [variant, workload, *(f"{rates[k]:,.1f}" for k in ("median", "min", "max"))]
        row.append(f"{statistics.median(found['seconds']):.2f}")
        base = default.get(workload)
        row.append(f"{rate / base['output_tokens_s']['median']:.2f}" if base else "-")
        row += [_against(rate, found.get("roofline_tokens_s")) for _ in bound]
        row += [_against(rate, found.get("peers_tokens_s", {}).get(peer)) for peer in peers]
        rows.append(row)
    return rows


def summary(variants: dict[str, Any]) -> str:
    """The table, start-up times, idle times and notes as text."""
    lines = ["", format_table(_rows(variants), num_left=2), ""]
    for variant, entry in variants.items():
        times = entry["start"]
        lines.append(
            f"{variant}: engine made in {times['start_s']:.1f} s, first token after "
            f"{times['first_token_s']:.1f} s"
        )
        if graphs := entry.get("graphs"):
            lines.append(
                f"{variant}: {graphs['count']} CUDA graphs, captured in {graphs['capture_s']:.1f} "
                f"s, {graphs['memory_bytes'] / 2**20:,.0f} MiB"
            )
        if found := entry.get("profile"):
            lines.append(
                f"{variant}: decode step {found['step_ms']:.3f} ms "
                f"({found['step_ms_recorded']:.3f} recorded), GPU busy "
                f"{found['gpu_busy_ms']:.3f} ms, idle {found['gpu_idle_ms']:.3f} ms "
                f"({found['idle_share']:.1%}), longest gap {found['longest_gap_us']:.1f} us"
            )
            lines += [
                f"  {t['us']:9.1f} us  {t['calls']:6.1f}  {t['name']:.90}" for t in found["top"]
            ]
        if variant in NOTES:
            lines.append(f"{variant}: {NOTES[variant]}")
    return "\n".join(lines)


def main(run: BenchEngineRun) -> int:
    """The command `samebit bench engine`."""
    require_own_report(run.run_dir / REPORT_FILE)
    torch.set_num_threads(run.cpu_threads)
    device = resolve_device(run.device)
    if run.profile and device.type != "cuda":
        raise DeviceError("profile=true measures the GPU's idle time: it needs a CUDA device")
    variants: dict[str, Any] = {}
    report = {
        "model": Path(run.model).resolve().name,
        "load_format": run.load_format,
        "engine": run.engine.given(),
        "numerics": asdict(numerics_profile(device)),
        "variants": variants,
    }
    for variant in run.variants:
        entry = variants[variant] = {}
        measure_variant(run, variant, device, entry, lambda: write_report(run.run_dir, report))
        gc.collect()  # the engine's memory goes to the next one
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(summary(variants))
    print(f"{run.run_dir / REPORT_FILE} holds the report.")
    return 0
