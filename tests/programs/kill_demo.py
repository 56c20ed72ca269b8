"""Kill the demo again and again, resume it, and compare it with an undisturbed run.

    python tests/programs/kill_demo.py OUT.json [kills=10] [seed=0] [ARGUMENT_OF_THE_DEMO ...]

Both runs go through the console command; a kill is SIGKILL to its whole process group at a random
instant. One in five comes while a process starts; the others after it has begun to write metrics,
up to twice one kill's share of the time that an undisturbed run spends from there on, so that they
spread over the run if its checkpoints are closer than that. Exit code 1 unless all kills came and
summaries (with the digest of the weights) and metrics (times aside) are there and equal to the bit.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samebit.recipes.cli.compose import resolve
from samebit.recipes.run.metrics import read_rows, without_times
from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import resolve_device

Outcome = tuple[dict[str, Any], list[dict[str, Any]]]
"""A demo's summary, and its metrics without times."""

OPTIONS = {"kills": 10, "seed": 0}
_STARTS = 0.2
_LOOK_S = 0.02


def parse(arguments: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Read our own options over their defaults; returns the rest, which is the demo's, too."""
    pairs = [argument.partition("=") for argument in arguments]
    own = {key: int(value) for key, _, value in pairs if key in OPTIONS}
    options = OPTIONS | own
    if options["kills"] < 1:
        raise ValueError(f"kills is {options['kills']}; it must be at least 1")
    return options, ["".join(pair) for pair in pairs if pair[0] not in OPTIONS]


@dataclass(frozen=True)
class Attempt:
    """Holds what became of one process of a demo."""

    ended: bool
    """By itself, in time."""
    seconds: float
    began_s: float
    """Until it wrote metrics; NaN: it did not."""


def run_demo(
    folder: Path,
    name: str,
    resume: bool,
    arguments: Sequence[str],
    start_s: float = math.inf,
    work_s: float = math.inf,
) -> Attempt:
    """Start the demo; kill it start_s seconds later, or work_s after it began to write metrics."""
    command = [sys.executable, "-m", "samebit.recipes.cli.main", "demo", *arguments]
    command += [f"run_name={name}", f"output_dir={folder}", f"resume={str(resume).lower()}"]
    metrics, start, began_s = metrics_path(folder, name), time.perf_counter(), math.nan
    before = metrics.read_bytes() if metrics.exists() else b""
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None:
            seconds = time.perf_counter() - start
            if math.isnan(began_s) and metrics.exists() and metrics.read_bytes() != before:
                began_s = seconds
            if seconds >= start_s or seconds - began_s >= work_s:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Attempt(False, seconds, began_s)
            time.sleep(_LOOK_S)
    if process.returncode != 0:
        raise RuntimeError(f"the demo ended with code {process.returncode}; see {log.name}")
    return Attempt(True, time.perf_counter() - start, began_s)


def metrics_path(folder: Path, name: str) -> Path:
    """Return where the metrics of a demo's reinforcement learning are."""
    return folder / name / "grpo" / "metrics.jsonl"


def result(folder: Path, name: str) -> Outcome:
    """Return a finished demo's summary and the metrics of its GRPO phase without times."""
    rows = read_rows(metrics_path(folder, name))
    return json.loads((folder / name / "summary.json").read_text()), without_times(rows)


def are_equal(whole: Outcome, resumed: Outcome) -> bool:
    """Say whether both results are there and equal to the bit: -0.0 is not 0.0, NaN is NaN."""
    compared = bool(whole[0] and whole[1])
    return compared and json.dumps(whole, sort_keys=True) == json.dumps(resumed, sort_keys=True)


def main(out: str, *arguments: str) -> int:
    """Run both and write the report."""
    options, demo = parse(arguments)
    device = resolve_device(resolve("demo", demo).device)  # as the demo itself will
    rng, kills = random.Random(options["seed"]), options["kills"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        alone = run_demo(folder, "undisturbed", False, demo)
        if math.isnan(alone.began_s):
            raise RuntimeError("the undisturbed demo wrote no metrics: there is nothing to compare")
        share = (alone.seconds - alone.began_s) / kills
        killed: list[Attempt] = []
        while len(killed) < kills:
            if rng.random() < _STARTS:
                limits = {"start_s": rng.uniform(0, alone.began_s)}
            else:
                limits = {"work_s": rng.uniform(0, 2 * share)}
            attempt = run_demo(folder, "killed", bool(killed), demo, **limits)
            if attempt.ended:
                break
            killed.append(attempt)
            print(f"killed after {attempt.seconds:.1f} s", flush=True)
        run_demo(folder, "killed", True, demo)
        whole, resumed = (result(folder, name) for name in ("undisturbed", "killed"))
    equal = are_equal(whole, resumed)
    report = {
        "undisturbed_s": round(alone.seconds, 1),
        "undisturbed_began_s": round(alone.began_s, 1),
        "killed_after_s": [round(attempt.seconds, 2) for attempt in killed],
        "killed_before_it_began": sum(math.isnan(attempt.began_s) for attempt in killed),
        "equal": equal,
        "undisturbed": whole[0],
        "killed": resumed[0],
        "metrics_compared": len(whole[1]),
        "figures_compared": sum(map(len, whole[1])),
    }
    write_result(Path(out), device, report, ["python", *sys.argv])
    print(json.dumps(report, indent=1))
    return 0 if equal and len(killed) == kills else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
