"""A GRPO step whose engine draws while its trainer trains, against the same step in turns.

    python tests/programs/async_step.py OUT.json [device=cuda] [model=FOLDER] [steps=4] [layers=28]
        [at_most=0.75] [ARGUMENT ...]

Both are `samebit grpo placement=process` on two GPUs: once in turns, once with
rollout.max_staleness=1. Random weights of Qwen3-1.7B's shape (fewer layers: a smaller one) unless a
model's folder is given; 16 prompts of 256 tokens, 8 samples of 2,048 each, which take longer to
draw than to train on. Each run is a process of its own, which is killed while it could go on: the
last steps of a run have nothing to draw beside them. ARGUMENTs go to the command. The first two
steps are left out: they capture graphs and compile, and in the first one two steps are drawn. Exit
code 1 unless the median step is at most `at_most` of that in turns, and log-probs were compared in
every step and all the same.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colocated_step import make_folder, medians, steps_of

from samebit.recipes.bench.output import format_table
from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import resolve_device

COMMAND = [
    "data=reverse_digits", "data.args.length=255", "data.size=1000000", "data.eval_size=1",
    "data.overlong_prompts=truncate_left", "rollout.prompts_per_step=16",
    "rollout.samples_per_prompt=8", "rollout.max_prompt_len=256", "rollout.max_new_tokens=2048",
    "rollout.eval_every=1000", "trainer.micro_batch_tokens=8192", "trainer.checkpoint_every=0",
    "logger=disabled", "engine.max_num_seqs=512", "engine.max_batch_tokens=8192",
    "reward=number_match", "placement=process",
]  # fmt: skip
RUNS = {"in turns": 0, "ahead": 1}
OPTIONS = {"device": "cuda", "model": "", "steps": "4", "layers": "28", "at_most": "0.75"}
COMPARED = "train/logprob_tokens_compared"


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Read our own options over their defaults; returns the rest, which is the command's."""
    pairs = [argument.partition("=") for argument in arguments]
    options = OPTIONS | {key: value for key, _, value in pairs if key in OPTIONS}
    return options, ["".join(pair) for pair in pairs if pair[0] not in OPTIONS]


def run(
    name: str, model: Path, work: Path, options: Mapping[str, str], own: Sequence[str]
) -> dict[str, Any]:
    """Run one of RUNS for so many steps, and two before them."""
    steps, folder = int(options["steps"]), name.replace(" ", "_")
    command = [sys.executable, "-m", "samebit.recipes.cli.main", "grpo", *COMMAND]
    command += [f"model.path={model}", f"output_dir={work}", f"run_name={folder}"]
    command += [f"device={options['device']}", f"rollout.max_staleness={RUNS[name]}"]
    command += [f"placement.transport={'nccl' if options['device'] == 'cuda' else 'gloo'}", *own]
    command.append(f"trainer.num_steps={steps + 5}")
    metrics = work / folder / "metrics.jsonl"
    rows = steps_of(command, metrics, steps + 2, work / f"{folder}.log")[1:]
    return {
        "command": command[2:],
        "steps": len(rows),
        **medians(rows),
        "rows": [{k: v for k, v in row.items() if k.startswith("perf/")} for row in rows],
        "logprobs_compared": [row.get(COMPARED, 0) for row in rows],
        "logprob_mismatches": sum(row.get("train/logprob_mismatches", 0) for row in rows),
        "staleness": [row.get("rollout/staleness", 0) for row in rows],
    }


def table(report: Mapping[str, Any]) -> str:
    """The medians of both, in seconds."""
    keys = ["step", "rollout", "rollout_wait", "overlap", "train", "compare", "sync"]
    rows = [["", *(f"{key} s" for key in keys), "compared", "mismatches"]]
    for name in RUNS:
        found = report[name]
        times = [found.get(f"perf/{key}_s") for key in keys]
        counts = [f"{sum(found['logprobs_compared']):,}", str(found["logprob_mismatches"])]
        rows.append([name, *("-" if x is None else f"{x:.3f}" for x in times), *counts])
    return format_table(rows)


def main(arguments: list[str]) -> int:
    """Run both and compare; returns the exit code."""
    out, *rest = arguments
    options, own = parse(rest)
    device, report = resolve_device(options["device"]), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="samebit_async_") as folder:
        work, model = Path(folder), Path(options["model"] or Path(folder) / "model")
        if not options["model"]:
            make_folder(model, int(options["layers"]))
        for name in RUNS:
            report[name] = run(name, model, work, options, own)
            write_result(Path(out), device, report, ["python", *sys.argv])
    ratio = report["ahead"]["perf/step_s"] / report["in turns"]["perf/step_s"]
    same = all(
        report[name]["logprob_mismatches"] == 0 and all(report[name]["logprobs_compared"])
        for name in RUNS
    )
    report["step_ratio"] = ratio
    write_result(Path(out), device, report, ["python", *sys.argv])
    print(json.dumps({"step_ratio": ratio, "at_most": float(options["at_most"]), "same": same}))
    print(table(report))
    return 0 if same and ratio <= float(options["at_most"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
