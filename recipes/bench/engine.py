"""samebit bench engine: output tokens per second of whole workloads, start-up, the GPU's share.

Random prompts, temperature 1, log-probs returned, end-of-sequence ignored. A workload runs once to
warm up and then `repeats` times, always with fresh prompts; median and spread are reported. On a
GPU the roofline stands beside them, and where a file has them, other engines' figures.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from samebit.recipes.bench.config import BenchEngineRun, Workload
from samebit.recipes.bench.idle import describe_gpu_times, profile_decode
from samebit.recipes.bench.output import REPORT_FILE, BenchError, format_table
from samebit.recipes.bench.peers import Peer, comparable, load_peers
from samebit.recipes.bench.prompts import PromptSource, timed_run
from samebit.recipes.bench.roofline import roofline_tokens_s
from samebit.recipes.bench.start import Start, cold_start, describe, report_of, start_engine
from samebit.recipes.bench.timing import CardRates, Spread, card_rates, free_memory
from samebit.recipes.bench.variants import NOTES, SETTINGS, kernels_of
from samebit.recipes.run.folder import require_own_report
from samebit.recipes.run.provenance import device_name, write_result
from samebit.rollout.device import DeviceError, resolve_device
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config


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


def measure_variant(
    run: BenchEngineRun,
    variant: str,
    device: torch.device,
    entry: dict[str, Any],
    save: Callable[[], object],
) -> None:
    """Fill the report's `entry` with every workload on one engine, saving after each."""
    with kernels_of(variant, device.type) as calls:
        engine, source, entry["start"] = start_engine(Start.of(run, variant, device))
        if calls is not None and not calls.count:
            raise BenchError(f"variant {variant}: the engine does not use what it replaces")
        print("\n".join(f"{variant}: {line}" for line in describe(entry)))
        entry["workloads"] = {}
        for workload in map(Workload.parse, run.workloads):
            found = measure(engine, source, workload, run.repeats)
            entry["workloads"][str(workload)] = found
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


def compare(run: BenchEngineRun, variants: dict[str, Any], peers: list[Peer]) -> dict[str, Any]:
    """Set beside every workload the roofline, on a GPU, and peers' figures; what they come from."""
    config, device = load_model_config(run.model), resolve_device(run.device)
    found: dict[str, Any] = {"peers": [asdict(peer) for peer in peers]} if peers else {}
    rates = card_rates() if device.type == "cuda" else None
    if rates is not None:
        found["card"] = asdict(rates)
    for entry in variants.values():
        for text, measured in entry["workloads"].items():
            if rates is not None:
                workload = Workload.parse(text)
                measured["roofline_tokens_s"] = roofline_tokens_s(config, workload, rates)
            theirs = {p.label: p.workloads[text] for p in peers if text in p.workloads}
            if theirs:
                measured["peers_tokens_s"] = theirs
    return found


def _against(rate: float, other: float | None) -> str:
    return f"{other:,.0f} (x{rate / other:.2f})" if other else "-"


def _rows(variants: dict[str, Any]) -> list[list[str]]:
    """The table: one line for each variant and workload; (x1.10): ours is 1.10 times that."""
    lines = [(v, w, found) for v, e in variants.items() for w, found in e["workloads"].items()]
    peers = list(dict.fromkeys(e for _, _, f in lines for e in f.get("peers_tokens_s", {})))
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


def summary(report: dict[str, Any]) -> str:
    """The table, what its columns compare with, starts, the GPU's share and notes as text."""
    variants = report["variants"]
    lines = ["", format_table(_rows(variants), num_left=2), ""]
    if card := report.get("card"):
        lines.append(CardRates(**card).words)
    for peer in report.get("peers", ()):
        lines.append(
            f"{peer['engine']} {peer['version']}: not measured here; {peer['card']}, "
            f"{peer['date']}, {peer['command']}"
        )
    for variant, entry in variants.items():
        lines += [f"{variant}: {line}" for line in describe(entry)]
        if graphs := entry.get("graphs"):
            lines.append(
                f"{variant}: {graphs['count']} CUDA graphs, captured in {graphs['capture_s']:.1f} "
                f"s when steps of their size first came, {graphs['memory_bytes'] / 2**20:,.0f} MiB"
            )
        if found := entry.get("profile"):
            lines.append(f"{variant}: {describe_gpu_times(found)}")
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
        raise DeviceError("profile=true traces what the GPU runs: it needs a CUDA device")
    idle = [name for name in run.variants if name in SETTINGS]
    if idle and device.type != "cuda":
        raise DeviceError(
            f"variants has {', '.join(idle)}: without a CUDA device they change nothing"
        )
    variants: dict[str, Any] = {}
    report = report_of(run, device) | {"variants": variants}
    peers = load_peers(run.peers) if run.peers else []
    beside = comparable(peers, device_name(device), report["model"], run.workloads)
    save = partial(write_result, run.run_dir / REPORT_FILE, device, report)
    for variant in run.variants:
        entry = variants[variant] = {}
        measure_variant(run, variant, device, entry, save)
        free_memory(device)  # the engine's goes to the next one
        if run.cold:
            entry["cold_start"] = cold_start(Start.of(run, variant, device))
    report |= compare(run, variants, beside)
    save()
    print(summary(report))
    if peers and not beside:
        print(
            f"{run.peers} has nothing of {report['model']} on {device_name(device)} with these "
            "workloads"
        )
    print(f"{run.run_dir / REPORT_FILE} holds the report.")
    return 0
