"""`make test-mutants`: are small lies in the code noticed by the default suite?

    python tests/mutants/run.py semantic [--table NAME] [--only MUTANT ...]
    python tests/mutants/run.py sample [--size N] [--seed N] [--only PART ...]
    python tests/mutants/run.py all
    python tests/mutants/run.py try --table FILE.toml [--reach FOLDER]

`semantic` tries the tables of this folder: each entry's own tests have to notice it. `sample` draws
mutants of cosmic-ray (see sample.py), records once which tests reach which lines, and runs those
tests against each. Every test that killed one is run once more without any: if it fails then too,
the command stops. Exits with 1 where less than 95% or 90% are killed. `--keep FOLDER` holds what
was recorded, and is used again as long as no file has changed. `try` takes entries that name no
tests yet, and tells which of those that reach their lines notice them.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")  # as tests/conftest.py
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hypothesis  # noqa: E402, F401
import megatron.core  # noqa: E402, F401
import transformers  # noqa: E402, F401
from mutants import sample  # noqa: E402
from mutants.choose import Reach  # noqa: E402
from mutants.judge import (  # noqa: E402
    Judge,
    Mutant,
    Round,
    Verdict,
    copy_repository,
    repository_files,
)
from mutants.result import Result, controls  # noqa: E402
from mutants.table import ROOT, SemanticMutant, read_table, tables  # noqa: E402

SEMANTIC_SHARE, SAMPLE_SHARE = 0.95, 0.90
NUM_WORKERS = 2


def chosen_semantic(table: str | None, only: list[str]) -> list[SemanticMutant]:
    """The tables' mutants, or some of them."""
    found = tables()
    if table is not None and table not in found:
        raise SystemExit(f"there is no table {table}; there are {', '.join(found)}")
    chosen = [m for name, entries in found.items() if table in (None, name) for m in entries]
    if unknown := sorted(set(only) - {m.name for m in chosen}):
        raise SystemExit(f"there is no mutant {', '.join(unknown)}")
    return [m for m in chosen if not only or m.name in only]


def require_green(scratch: Path, mutants: list[SemanticMutant]) -> None:
    """Stop if a test that is to notice a lie fails without one."""
    tests = sorted({test for m in mutants for test in m.killed_by})
    if run_suite(copy_repository(ROOT, scratch / "unchanged"), *tests) != 0:
        raise SystemExit("tests of the tables fail without any lie: there is nothing to judge by")


def judge(
    by: Judge, rounds: list[tuple[Mutant, Iterable[Round]]], shown: Mapping[str, str]
) -> list[Verdict]:
    """A line for each mutant as soon as it is known; of one that lives, what is `shown` of it."""
    verdicts: list[Verdict] = []

    def report(verdict: Verdict) -> None:
        verdicts.append(verdict)
        place = f"{len(verdicts):4d}/{len(rounds)}"
        tests = f"{verdict.num_tests} tests, {verdict.seconds:.0f} s"
        print(f"{place} {verdict.name}: {verdict.end} ({tests})", flush=True)
        if not verdict.killed and verdict.name in shown:
            print(f"      {shown[verdict.name]}", flush=True)

    by.judge(rounds, report)
    return verdicts


def run_controls(by: Judge, verdicts: list[Verdict]) -> int:
    """Run the tests that killed, in the same copies, without any lie: their number. Stop if one
    fails."""
    found: list[Verdict] = []
    by.judge(controls(verdicts), found.append)
    if wrong := sorted(v.killed_by for v in found if v.killed):
        raise SystemExit(f"fails without any lie, so what it killed says nothing: {wrong}")
    return sum(v.num_tests for v in found)


def judge_semantic(scratch: Path, mutants: list[SemanticMutant]) -> Result:
    """Each against the tests that it names."""
    by = Judge(ROOT, scratch, NUM_WORKERS)
    judged = [m for m in mutants if not m.equivalent]
    rounds = [(m, [Round(tuple((test, 60.0) for test in m.killed_by))]) for m in judged]
    verdicts = judge(by, rounds, {})
    return Result(
        chosen="written",
        verdicts=verdicts,
        equivalents={m.name: m.equivalent for m in mutants if m.equivalent},
        num_controls=run_controls(by, verdicts),
    )


def judge_tried(scratch: Path, reach: Reach, table: Path) -> list[Verdict]:
    """New mutants against the tests that reach their lines."""
    rounds = [(m, reach.rounds(m.file, m.line)) for m in read_table(table)]
    return judge(Judge(ROOT, scratch, NUM_WORKERS), rounds, {})


def judge_sample(scratch: Path, reach: Reach, size: int, seed: int, only: list[str]) -> Result:
    """A sample against the tests that reach each line."""
    by = Judge(ROOT, scratch, NUM_WORKERS)
    drawn = sample.draw(size, seed)
    drawn = [m for m in drawn if not only or any(part in m.name for part in only)]
    equivalents = sample.equivalents(drawn)
    changes = {m.name: m.change() for m in drawn}
    rounds = [(m, reach.rounds(m.file, m.line)) for m in drawn if m.name not in equivalents]
    verdicts = judge(by, rounds, changes)
    return Result(
        chosen="drawn",
        verdicts=verdicts,
        equivalents=equivalents,
        changes=changes,
        num_controls=run_controls(by, verdicts),
    )


def tree_digest() -> str:
    """Of every file that git knows or would take."""
    digest = hashlib.sha256()
    for name in repository_files(ROOT):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        digest.update(os.fsencode(name) + b"\0" + content + b"\0")
    return digest.hexdigest()[:16]


def run_suite(copy: Path, *arguments: str) -> int:
    """pytest's exit code in a copy of the repository, over tests that need no GPU."""
    paths = os.pathsep.join([str(copy / ".typing"), str(copy / "tests")])
    options = f"-q -p no:cacheprovider -n {NUM_WORKERS} --dist loadfile".split()
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-m", "not gpu and not long", *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
        check=False,
    ).returncode


def record_reach(scratch: Path, keep: Path | None) -> Reach:
    """Run the default suite once, in a copy, and note what each test reaches."""
    folder = (keep or scratch) / f"reach-{tree_digest()}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        copy = copy_repository(ROOT, scratch / "recorded")
        code = run_suite(copy, "-p", "mutants.reach", f"--reach-folder={folder.absolute()}")
        if code != 0:
            raise SystemExit("tests fail without any lie: there is nothing to judge by")
        (folder / "complete").touch()
    return Reach(folder)


def provenance() -> dict[str, Any]:
    """Command, source, machine and versions, told by the program of that name."""
    code = (
        "import json, sys, torch; from samebit.recipes.run.provenance import provenance;"
        "print(json.dumps(provenance(sys.argv[1:], torch.device('cpu'))))"
    )
    command = [sys.executable, "-c", code, "python", "tests/mutants/run.py", *sys.argv[1:]]
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout)


def told(name: str, result: Result, share: float) -> bool:
    """Print the figure; whether it is enough."""
    print(f"{name}: {result.figure()}; {share:.0%} is asked", flush=True)
    print(f"{result.num_controls} tests that killed one pass without any", flush=True)
    return result.is_enough(share)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["semantic", "sample", "all", "try"])
    parser.add_argument("--table", help="one table of this folder; for try, a file")
    parser.add_argument("--only", nargs="+", default=[], help="names, or parts of a sample's names")
    parser.add_argument("--size", type=int, default=sample.SIZE)
    parser.add_argument("--seed", type=int, default=sample.SEED)
    parser.add_argument("--keep", type=Path, help="a folder for what was recorded")
    parser.add_argument("--reach", type=Path, help="for try: what was recorded of another tree")
    parser.add_argument("--output", type=Path, help="a JSON file for all verdicts")
    given = parser.parse_args()
    start, good, found = time.time(), True, provenance()
    with tempfile.TemporaryDirectory(prefix="samebit-mutants-") as folder:
        scratch = Path(folder)
        reach = None
        if given.what != "semantic":
            reach = Reach(given.reach) if given.reach else record_reach(scratch, given.keep)
            found["num_recorded_tests"] = len(reach.tests)
            print(f"{len(reach.tests)} tests recorded, {time.time() - start:.0f} s", flush=True)
        if given.what == "try":
            assert reach is not None
            tried = judge_tried(scratch / "tried", reach, Path(given.table))
            return 0 if all(v.killed for v in tried) else 1
        if given.what in ("semantic", "all"):
            mutants = chosen_semantic(given.table, given.only)
            if reach is None:
                require_green(scratch, mutants)
            result = judge_semantic(scratch / "semantic", mutants)
            found["semantic"] = result.as_json()
            good &= told("semantic mutants", result, SEMANTIC_SHARE)
        if given.what in ("sample", "all"):
            assert reach is not None
            how = {"size": given.size, "seed": given.seed}
            result = judge_sample(scratch / "sample", reach, **how, only=given.only)
            found["sample"] = {**how, **result.as_json()}
            good &= told("sampled mutants", result, SAMPLE_SHARE)
    seconds = round(time.time() - start)
    print(f"{seconds} s")
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps({**found, "seconds": seconds}, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
