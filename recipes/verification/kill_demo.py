"""Kill the demo again and again, resume it, and compare its weights with an undisturbed run's.

    python -m samebit.recipes.verification.kill_demo out.json [kills] [seed]

Both runs go through the console command; a kill is SIGKILL to its whole process group at a random
instant. Exit code 1 unless the digests and the counts of compared tokens are equal.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from samebit.recipes.metrics import write_atomically
from samebit.recipes.provenance import provenance

SHORTEST_S, LONGEST_S = 6.0, 45.0  # between a start and its kill


def run_demo(folder: Path, name: str, resume: bool, limit_s: float | None) -> bool:
    """Start the demo and kill it after limit_s seconds; whether it ended by itself."""
    command = [sys.executable, "-m", "samebit.recipes.cli", "demo", "demo=reverse_digits"]
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


def summary(folder: Path, name: str) -> dict[str, Any]:
    """What the finished demo says of itself."""
    return json.loads((folder / name / "summary.json").read_text())


def main(out: str, kills: str = "10", seed: str = "0") -> int:
    """Run both, write the report."""
    rng = random.Random(int(seed))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        run_demo(folder, "undisturbed", resume=False, limit_s=None)
        undisturbed_s = time.perf_counter() - start
        killed_after: list[float] = []
        while len(killed_after) < int(kills):
            limit = rng.uniform(SHORTEST_S, LONGEST_S)
            if run_demo(folder, "killed", resume=bool(killed_after), limit_s=limit):
                break
            killed_after.append(round(limit, 2))
            print(f"killed after {limit:.1f} s", flush=True)
        run_demo(folder, "killed", resume=True, limit_s=None)
        found = {name: summary(folder, name) for name in ("undisturbed", "killed")}
    equal = found["killed"] == found["undisturbed"]
    report = {
        **provenance(["python", "-m", "samebit.recipes.verification.kill_demo", *sys.argv[1:]]),
        "undisturbed_s": round(undisturbed_s, 1),
        "killed_after_s": killed_after,
        "equal": equal,
        **found,
    }
    write_atomically(Path(out), json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if equal and len(killed_after) == int(kills) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
