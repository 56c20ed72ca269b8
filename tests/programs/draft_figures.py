"""What runs and benchmarks of drafts have come to, beside the bars that they are held to.

python tests/programs/draft_figures.py words RUN
    The words by which bench speculative asks the held-out prompts of a run of samebit eagle3.
python tests/programs/draft_figures.py trained RUN...
    Of runs of samebit eagle3 that have ended: accept lengths, suffix's on the same answers, the
    target's entropy over the draft's vocabulary, minutes.
python tests/programs/draft_figures.py online ONLINE FROZEN NONE
    Accept lengths over three GRPO runs of one seed: of a draft that learns, of one that stays as it
    is, without one. Exit code 1 if the first one's are below their start at the end, or if the
    runs' weights are not equal.
python tests/programs/draft_figures.py block BENCH
    Accept lengths for each millisecond of drafting: of bench speculative with proposers eagle3,
    peagle and simulated at one sample at a time, where a step is a verification. Drafting is what
    a step takes longer than with simulated guesses, which verifies as many.
python tests/programs/draft_figures.py rows BENCH...
    What a step that verifies takes, as a multiple of a decode step of the same samples: of bench
    speculative with proposer simulated, none of whose guesses is right.
"""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from samebit.recipes.bench.output import REPORT_FILE, format_table
from samebit.recipes.run.folder import CONFIG_FILE
from samebit.recipes.run.metrics import METRICS_FILE, SPECULATION, read_rows
from samebit.recipes.run.run_data import SUMMARY_FILE

DATA = ("task", "chat", "few_shot", "size", "eval_size", "seed", "args", "overlong_prompts")
BARS = {"accept_length": 2.5, "greedy_accept_length": 2.8}
"""At least, at ttt.eval_passes=5."""
MOST_MINUTES, MOST_STEPS = 20.0, 1.10
ENDS = 10
"""Steps at a run's start and at its end whose accept lengths are averaged."""


def beside(value: float, bar: float, least: bool) -> str:
    """A figure with its bar: the least that it may be, or the most."""
    holds = value >= bar if least else value <= bar
    return f"{value:.3f} ({'>=' if least else '<='} {bar:g}{'' if holds else ' MISSED'})"


def _summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / SUMMARY_FILE).read_text())
    return found


def _batches(bench: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((bench / REPORT_FILE).read_text())["batches"]
    return found


def words(run: Path) -> list[str]:
    """Return the words of bench speculative that name a run's prompts and lengths."""
    config = yaml.safe_load((run / CONFIG_FILE).read_text())
    data, rollout = config["data"], config["rollout"]
    values = {f"data.{key}": data[key] for key in DATA} | {
        "seed": config["seed"],
        "input_len": rollout["max_prompt_len"],
        "output_len": rollout["max_new_tokens"],
        "temperature": rollout["eval_temperature"],
    }
    return [f"{key}={_written(value)}" for key, value in values.items()]


def _written(value: Any) -> str:
    """As the command line reads it: keys without quotes."""
    return value if isinstance(value, str) else re.sub(r'"(\w+)":', r"\1:", json.dumps(value))


def trained(runs: Sequence[Path]) -> str:
    """Return a table of those runs of samebit eagle3 that have ended."""
    keys = ("accept_length", "suffix_accept_length", "greedy_accept_length",
            "greedy_suffix_accept_length", "entropy")  # fmt: skip
    rows = [["run", "steps", *keys, "minutes"]]
    for run in runs:
        if not (run / SUMMARY_FILE).exists():
            continue
        found = _summary(run)
        shown = [
            beside(found[key], BARS[key], least=True) if key in BARS else f"{found[key]:.3f}"
            for key in keys
        ]
        minutes = beside(found["perf/wall_s"] / 60, MOST_MINUTES, least=False)
        rows.append([run.name, str(found["steps"]), *shown, minutes])
    return format_table(rows)


def ends(run: Path) -> tuple[float, float]:
    """Return the mean accept lengths of a GRPO run's first and last steps."""
    key = f"{SPECULATION}accept_length"
    lengths = [row[key] for row in read_rows(run / METRICS_FILE) if key in row]
    return statistics.fmean(lengths[:ENDS]), statistics.fmean(lengths[-ENDS:])


def online(runs: Sequence[Path]) -> tuple[str, bool]:
    """Return (a table, whether all is as it has to be) of three GRPO runs."""
    learning, frozen, _ = runs
    rows = [["draft", f"first {ENDS} steps", f"last {ENDS} steps"]]
    rows += [[run.name, *(f"{length:.3f}" for length in ends(run))] for run in (learning, frozen)]
    digests = {_summary(run)["weights_digest"] for run in runs}
    first, last = ends(learning)
    return f"{format_table(rows)}\nweights digests: {', '.join(sorted(digests))}", (
        last >= first and len(digests) == 1
    )


def block(benches: Sequence[Path]) -> str:
    """Return a table of chains' and block drafts' accept length by what drafting takes."""
    rows = [["bench", "draft", "accept length", "drafting ms", "accept length / ms", "tok/s"]]
    for bench in benches:
        [(batch, entry)] = _batches(bench).items()
        if batch != "1":
            raise ValueError(f"{bench} is of {batch} samples at a time; give one of 1")
        step_ms = {
            name: 1e3 * sum(found["seconds"]) / found["verifications"]
            for name, found in entry.items()
            if name != "none"
        }
        for name in (name for name in ("eagle3", "peagle") if name in entry):
            length, drafting = entry[name]["accept_length"], step_ms[name] - step_ms["simulated"]
            by_ms = f"{length / drafting:.3f}" if drafting > 0 else "-"
            rate = f"{entry[name]['output_tokens_s']['median']:,.1f}"
            rows.append([bench.name, name, f"{length:.3f}", f"{drafting:.3f}", by_ms, rate])
    return format_table(rows)


def verified_rows(benches: Sequence[Path]) -> str:
    """Return a table of steps that verify beside decode steps."""
    rows = [["samples", "rows of each", "rows", "x a decode step"]]
    for bench in benches:
        for batch, entry in _batches(bench).items():
            each = 1 + len(entry["simulated"]["acceptance"])
            step = beside(1 / entry["simulated"]["x_none"], MOST_STEPS, least=False)
            rows.append([batch, str(each), str(int(batch) * each), step])
    return format_table(rows)


def main(what: str, folders: Sequence[str]) -> int:
    """Print what is asked for; return the exit code."""
    paths = [Path(folder) for folder in folders]
    holds = True
    if what == "words":
        text = "\n".join(words(paths[0]))
    elif what == "online":
        text, holds = online(paths)
    elif what == "block":
        text = block(paths)
    else:
        text = {"trained": trained, "rows": verified_rows}[what](paths)
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
