"""samebit bench memory: what an engine gives back by tag, and how fast it has it again.

Two engines in turn, without and with a backup of the weights in host memory. Weights without one
are loaded again into the same memory, under a lease. Before a row and after it the same requests
have to be answered by the same bits. Then everything is released and resumed and the weights are
updated, `cycles` times: memory must not grow. Times are between moments at which the device is
done.

A GPU's driver clears pages that were given back before it gives them again, in the background.
So a resume is timed a second after its release, as a phase of training would lie between them, and
once more without that second: "at once" it waits for pages to be cleared.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from samebit.recipes.bench.bars import BACK_GIB_S, RELEASE_MS, RESUME_MS, Bars
from samebit.recipes.bench.config import BenchMemoryRun, Workload
from samebit.recipes.bench.output import REPORT_FILE, BenchError, format_table
from samebit.recipes.bench.prompts import FixedPrompts, PromptSource
from samebit.recipes.bench.start import fill, report_of, settings_of
from samebit.recipes.bench.timing import Spread, free_memory, timed
from samebit.recipes.run.folder import require_own_report
from samebit.recipes.run.provenance import device_name, write_result
from samebit.rollout.device import resolve_device
from samebit.rollout.engine import Engine
from samebit.weight_sync.transports.alias import AliasLease

ROWS: tuple[tuple[str, list[str] | None, bool], ...] = (
    ("weights", ["weights"], False),
    ("kv_cache", ["kv_cache"], False),
    ("cuda_graphs", ["cuda_graphs"], False),
    ("all", None, False),
    ("weights, backup", ["weights"], True),
    ("all, backup", None, True),
)
"""Name, tags and whether the engine keeps a backup of the weights."""
PHASE_S = 1.0


def used_bytes(device: torch.device) -> int:
    """Memory that is in use: of a GPU by everybody, of a CPU by this process."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) << 10


class Subject:
    """An engine that is measured, its requests and what it answered to them at first."""

    def __init__(self, run: BenchMemoryRun, device: torch.device, backup: bool) -> None:
        settings = settings_of(run, releasable=True, weights_backup=backup)
        self.engine = Engine(run.model, settings, device=device)
        self.has_backup = backup
        self._run = run
        source = PromptSource(self.engine.model_config.vocab_size, run.seed)
        self._prompts = FixedPrompts.of(source, Workload.parse(run.workload))
        self._truth = self._prompts.outcomes(self.engine)
        self.check("a second time")

    def check(self, when: str) -> int:
        """Tokens compared; BenchError unless all are the first answer's, to the bit."""
        return self._prompts.require_same(self.engine, self._truth, when)

    def load_again(self) -> None:
        """Fill the weights that are served with what they held at first."""
        fill(self._run, self.engine.specs, self.engine.weights)

    def update(self, load: Callable[[], None] = lambda: None) -> None:
        """Have the engine take its weights as those of the next step, once `load` has run."""
        digest, lease = self.engine.weight_version.digest, AliasLease(self.engine.sink)
        lease.lease(self.engine.weight_version.step + 1)
        load()
        lease.update(self.engine.weights, digest)


def measure(
    subject: Subject, name: str, tags: Sequence[str] | None, repeats: int
) -> dict[str, Any]:
    """One row: bytes released, memory in use after it, seconds of both ways."""
    engine, device = subject.engine, subject.engine.device
    released, used = list[float](), list[int]()
    resumed, at_once = list[float](), list[float]()
    given: dict[str, int] = {}
    for times in [at_once] * (repeats + 1) + [resumed] * repeats:
        given, seconds = timed(partial(engine.release_memory_occupation, tags), device)
        released.append(seconds)
        used.append(used_bytes(device))
        if times is resumed and device.type == "cuda":
            time.sleep(PHASE_S)
        _, seconds = timed(partial(engine.resume_memory_occupation, tags), device)
        times.append(seconds)
    if given.get("weights") and not subject.has_backup:
        subject.update(subject.load_again)
    found: dict[str, Any] = {
        "bytes": {tag: count for tag, count in given.items() if count},
        "used_bytes": max(used),
        "release_s": asdict(Spread.of(released[1:])),
        "resume_s": asdict(Spread.of(resumed)),
        "resume_at_once_s": asdict(Spread.of(at_once[1:])),
        "tokens_compared": subject.check(f"after release and resume of {name}"),
    }
    if subject.has_backup:
        found["bytes_back_s"] = given["weights"] / found["resume_s"]["median"]
    return found


def cycle(subject: Subject, cycles: int) -> dict[str, Any]:
    """Everything released and resumed and the weights updated, again and again."""
    engine, device = subject.engine, subject.engine.device
    reserved, used, seconds, tokens = list[int](), list[int](), list[float](), 0

    def once() -> None:
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        subject.update()

    for number in range(1, cycles + 1):
        seconds.append(timed(once, device)[1])
        tokens += subject.check(f"after cycle {number}")
        reserved.append(torch.cuda.memory_reserved(device) if device.type == "cuda" else 0)
        used.append(used_bytes(device))
    return {
        "count": cycles,
        "seconds": asdict(Spread.of(seconds)),
        "reserved_bytes": [reserved[0], reserved[-1]],
        "used_bytes": [used[0], used[-1]],
        "tokens_compared": tokens,
    }


def require_no_growth(found: dict[str, Any], device: torch.device) -> None:
    """BenchError if a GPU's memory grew from the first cycle to the last.

    A CPU's process grows and shrinks by what Python does.
    """
    for key in ("reserved_bytes", "used_bytes"):
        first, last = found[key]
        if device.type == "cuda" and last > first:
            raise BenchError(
                f"{found['count']} cycles: {key} grew from {first:,} to {last:,}; nothing may grow"
            )


def summary(report: dict[str, Any], device: torch.device) -> str:
    """The table and the cycles in words."""
    bars, total = Bars(device_name(device), report["model"]), report["total_bytes"]
    last = "resident GiB" if total is None else "free GiB"
    header = ["tags", "GiB", last, "release ms", "min", "max", "resume ms", "min", "max"]
    rows = [[*header, "at once", "GiB/s"]]
    for name, found in report["rows"].items():
        used, everything = found["used_bytes"], name.startswith("all")
        left = (used if total is None else total - used) / 2**30
        row = [name, f"{sum(found['bytes'].values()) / 2**30:,.2f}"]
        row.append(bars.beside(left, bars.free_gib if everything else None, least=True))
        backup = "bytes_back_s" in found
        for key, bar in (("release_s", RELEASE_MS), ("resume_s", RESUME_MS)):
            ms = {k: 1e3 * s for k, s in found[key].items()}
            row.append(bars.beside(ms["median"], bar if everything and not backup else None))
            row += [f"{ms[k]:,.1f}" for k in ("min", "max")]
        row.append(f"{1e3 * found['resume_at_once_s']['median']:,.1f}")
        back, least = found.get("bytes_back_s", 0.0) / 2**30, None if everything else BACK_GIB_S
        row.append(bars.beside(back, least, least=True) if backup else "-")
        rows.append(row)
    cycles = report["cycles"]
    grown = [last - first for first, last in (cycles["reserved_bytes"], cycles["used_bytes"])]
    compared = sum(f["tokens_compared"] for f in (*report["rows"].values(), cycles))
    return "\n".join(
        [
            format_table(rows),
            f"{cycles['count']} times everything released, resumed (weights from their backup) and "
            f"the weights updated, {1e3 * cycles['seconds']['median']:,.1f} ms each: memory "
            f"reserved by torch grew by {grown[0]:,} bytes, memory in use by {grown[1]:,}.",
            f"GiB/s: of weights, back from host memory, with all that a resume does. {compared:,} "
            "tokens and their log-probs compared: all were equal.",
        ]
    )


def main(run: BenchMemoryRun) -> int:
    """The command `samebit bench memory`."""
    require_own_report(run.run_dir / REPORT_FILE)
    torch.set_num_threads(run.cpu_threads)
    device = resolve_device(run.device)
    rows: dict[str, Any] = {}
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    report = report_of(run, device) | {"total_bytes": total, "rows": rows}
    save = partial(write_result, run.run_dir / REPORT_FILE, device, report)
    for backup in (False, True):
        subject = Subject(run, device, backup)
        for name, tags, with_backup in ROWS:
            has_memory = any(subject.engine.arena.num_bytes(tag) for tag in tags or ("weights",))
            if with_backup == backup and has_memory:
                rows[name] = measure(subject, name, tags, run.repeats)
                save()
        if backup:
            report["cycles"] = cycle(subject, run.cycles)
        subject.engine.close()
        del subject
        free_memory(device)  # the engine's goes to the next one
    save()
    print(summary(report, device))
    require_no_growth(report["cycles"], device)
    print(f"{run.run_dir / REPORT_FILE} holds the report.")
    return 0
