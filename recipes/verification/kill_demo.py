"""Kill the demo again and again, resume it, and compare it with an undisturbed run.

    python -m samebit.recipes.verification.kill_demo OUT.json [kills=10] [seed=0] [shortest_s=...]
        [longest_s=...] [ARGUMENT_OF_THE_DEMO ...]

Both runs go through the console command; a kill is SIGKILL to its whole process group at a random
instant, from shortest_s to longest_s after its start. By themselves these are half the time to the
undisturbed run's first metrics, and that time with somewhat less than twice one kill's share of
what follows. Exit code 1 unless summaries (with the digest of the weights) and metrics (times
aside) are equal.
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

from samebit.recipes.metrics import read_rows, without_times, write_atomically
from samebit.recipes.provenance import provenance

OPTIONS = {"kills": 10.0, "seed": 0.0, "shortest_s": math.nan, "longest_s": math.nan}
_SHARE = 1.8
"""Of what follows the start, over the number of kills: below 2, so that none finds the run over."""
_LOOK_S = 0.02


def parse(arguments: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Our own options over their defaults, and what is the demo's."""
    pairs = [argument.partition("=") for argument in arguments]
    own = {key: float(value) for key, _, value in pairs if key in OPTIONS}
    return OPTIONS | own, ["".join(pair) for pair in pairs if pair[0] not in OPTIONS]


@dataclass(frozen=True)
class Attempt:
    """One process of a demo."""

    ended: bool
    """By itself, in time."""
    seconds: float
    first_row_s: float
    """Until there were metrics."""


def run_demo(
    folder: Path, name: str, resume: bool, limit_s: float, arguments: Sequence[str]
) -> Attempt:
    """Start the demo and kill it after limit_s seconds."""
    command = [sys.executable, "-m", "samebit.recipes.cli", "demo", *arguments]
    command += [f"run_name={name}", f"output_dir={folder}", f"resume={str(resume).lower()}"]
    metrics, start, first_row_s = metrics_path(folder, name), time.perf_counter(), math.nan
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None:
            seconds = time.perf_counter() - start
            if math.isnan(first_row_s) and read_rows(metrics):
                first_row_s = seconds
            if seconds >= limit_s:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Attempt(False, seconds, first_row_s)
            time.sleep(_LOOK_S)
    if process.returncode != 0:
        raise RuntimeError(f"the demo ended with code {process.returncode}; see {log.name}")
    return Attempt(True, time.perf_counter() - start, first_row_s)


def metrics_path(folder: Path, name: str) -> Path:
    """Of a demo's reinforcement learning."""
    return folder / name / "grpo" / "metrics.jsonl"


def window(options: dict[str, float], undisturbed: Attempt) -> tuple[float, float]:
    """The earliest and the latest moment of a kill, in seconds."""
    first = undisturbed.first_row_s
    latest = first + _SHARE * (undisturbed.seconds - first) / options["kills"]
    given = options["shortest_s"], options["longest_s"]
    return (
        first / 2 if math.isnan(given[0]) else given[0],
        latest if math.isnan(given[1]) else given[1],
    )


def result(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A finished demo's summary, and the metrics of its reinforcement learning without times."""
    rows = read_rows(metrics_path(folder, name))
    return json.loads((folder / name / "summary.json").read_text()), without_times(rows)


def main(out: str, *arguments: str) -> int:
    """Run both, write the report."""
    options, demo = parse(arguments)
    rng, kills = random.Random(int(options["seed"])), int(options["kills"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        alone = run_demo(folder, "undisturbed", False, math.inf, demo)
        earliest, latest = window(options, alone)
        killed_after: list[float] = []
        while len(killed_after) < kills:
            limit = rng.uniform(earliest, latest)
            if run_demo(folder, "killed", bool(killed_after), limit, demo).ended:
                break
            killed_after.append(round(limit, 2))
            print(f"killed after {limit:.1f} s", flush=True)
        run_demo(folder, "killed", True, math.inf, demo)
        undisturbed, killed = (result(folder, name) for name in ("undisturbed", "killed"))
    equal = killed == undisturbed
    report = {
        **provenance(["python", "-m", "samebit.recipes.verification.kill_demo", out, *arguments]),
        "undisturbed_s": round(alone.seconds, 1),
        "first_metrics_s": round(alone.first_row_s, 1),
        "killed_after_s": killed_after,
        "equal": equal,
        "undisturbed": undisturbed[0],
        "killed": killed[0],
        "metrics_compared": len(undisturbed[1]),
    }
    write_atomically(Path(out), json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if equal and len(killed_after) == kills else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
