"""Kill the demo again and again, resume it, and compare it with an undisturbed run.

    python -m samebit.recipes.verification.kill_demo OUT.json [kills=10] [seed=0] [shortest_s=6]
        [longest_s=45] [ARGUMENT_OF_THE_DEMO ...]

Both runs go through the console command; a kill is SIGKILL to its whole process group at a random
instant, so many seconds after its start. Exit code 1 unless summaries (with the digest of the
weights) and metrics (times aside) are equal.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samebit.recipes.metrics import read_rows, without_times, write_atomically
from samebit.recipes.provenance import provenance

OPTIONS = {"kills": 10.0, "seed": 0.0, "shortest_s": 6.0, "longest_s": 45.0}


def parse(arguments: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Our own options over their defaults, and what is the demo's."""
    pairs = [argument.partition("=") for argument in arguments]
    own = {key: float(value) for key, _, value in pairs if key in OPTIONS}
    return OPTIONS | own, ["".join(pair) for pair in pairs if pair[0] not in OPTIONS]


def run_demo(
    folder: Path, name: str, resume: bool, limit_s: float | None, arguments: Sequence[str]
) -> bool:
    """Start the demo and kill it after limit_s seconds; whether it ended by itself."""
    command = [sys.executable, "-m", "samebit.recipes.cli", "demo", *arguments]
    command += [f"run_name={name}", f"output_dir={folder}", f"resume={str(resume).lower()}"]
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
    if code != 0:
        raise RuntimeError(f"the demo ended with code {code}; see {log.name}")
    return True


def result(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A finished demo's summary, and the metrics of its reinforcement learning without times."""
    rows = read_rows(folder / name / "grpo" / "metrics.jsonl")
    return json.loads((folder / name / "summary.json").read_text()), without_times(rows)


def main(out: str, *arguments: str) -> int:
    """Run both, write the report."""
    options, demo = parse(arguments)
    rng, kills = random.Random(int(options["seed"])), int(options["kills"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        run_demo(folder, "undisturbed", False, None, demo)
        undisturbed_s = time.perf_counter() - start
        killed_after: list[float] = []
        while len(killed_after) < kills:
            limit = rng.uniform(options["shortest_s"], options["longest_s"])
            if run_demo(folder, "killed", bool(killed_after), limit, demo):
                break
            killed_after.append(round(limit, 2))
            print(f"killed after {limit:.1f} s", flush=True)
        run_demo(folder, "killed", True, None, demo)
        undisturbed, killed = (result(folder, name) for name in ("undisturbed", "killed"))
    equal = killed == undisturbed
    report = {
        **provenance(["python", "-m", "samebit.recipes.verification.kill_demo", out, *arguments]),
        "undisturbed_s": round(undisturbed_s, 1),
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
