"""Short GRPO runs under every layout that this machine's GPUs can hold, through the public command.

    python tests/programs/layouts.py OUT.json [device=cuda] [num_gpus=4]
        [only=NAME,NAME] [at_once=1] [KEY=VALUE of samebit grpo ...]

Each run starts as many processes as its layout has, on a small random model that is made on the
spot, and compares every log-prob of its first optimizer steps between rollout and trainer. The
first rollouts are drawn from the same weights, so layouts with equally many tensor parallel ranks
(all, under numerics.tp_invariant=true) must draw the same tokens with the same log-probs. Weights
after training are each layout's own. Exit code 1 if a run fails, compares or trains nothing, or
anything differs that may not.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from samebit.recipes.models.tiny_model import write_character_tokenizer, write_config, write_weights
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.provenance import write_result
from samebit.recipes.run.rollouts import list_rollouts
from samebit.rollout.device import resolve_device
from samebit.trainer.config import ParallelConfig

HERE = Path(__file__).resolve().parent
"""On the search path of the runs, whose reward is a function of this file."""
OPTIONS = {"device": "cuda", "num_gpus": "4", "only": "", "at_once": "1"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "tensor2": {"tensor": 2},
    "pipeline2": {"pipeline": 2},
    "pipeline2_virtual2": {"pipeline": 2, "virtual_pipeline": 2},
    "context2": {"context": 2},
    "data2": {"data": 2},
    "tensor4_sequence": {"tensor": 4, "sequence": True},
    "data4_distributed_optimizer": {"data": 4, "distributed_optimizer": True},
    "tensor2_data2": {"tensor": 2, "sequence": True, "data": 2},
    "tensor2_pipeline2": {"tensor": 2, "pipeline": 2},
    "tensor2_context2": {"tensor": 2, "context": 2},
    "pipeline2_data2": {"pipeline": 2, "data": 2},
    "context2_data2": {"context": 2, "data": 2},
}
TIMEOUT_S = 900
_SETTINGS = {
    "data": "reverse_digits",
    "data.args.length": 4,
    "data.size": 64,
    "data.eval_size": 4,
    "reward.name": "layouts:odd_characters",
    "rollout.prompts_per_step": 8,
    "rollout.samples_per_prompt": 8,
    "rollout.max_prompt_len": 16,
    "rollout.max_new_tokens": 64,
    "trainer.num_steps": 3,
    "trainer.micro_batch_tokens": 512,
    "trainer.optimizer.lr": "1e-4",
    "logger": "disabled",
    "logger.save_rollouts": "true",
}


def odd_characters(text: str, _problem: Any) -> float:
    """A reward that a random model earns in many sizes, so that every step trains."""
    return sum(ord(character) % 2 for character in text) / 64


def make_model(folder: Path) -> None:
    """A random Qwen3 that four tensor parallel ranks or four layer groups can share."""
    characters = "0123456789=" + "".join(chr(0x4E00 + i) for i in range(2036))
    write_config(
        folder,
        "qwen3",
        vocab_size=1 + len(characters),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=False,
        max_position_embeddings=128,
    )
    write_character_tokenizer(folder, characters)
    write_weights(folder, seed=0, std=0.1)


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options over their defaults, and what is grpo's."""
    pairs = [argument.partition("=") for argument in arguments]
    own = {key: value for key, _, value in pairs if key in OPTIONS}
    if unknown := sorted(set(filter(None, own.get("only", "").split(","))) - LAYOUTS.keys()):
        raise ValueError(f"only: no {', '.join(unknown)}; there are {', '.join(LAYOUTS)}")
    return OPTIONS | own, ["".join(pair) for pair in pairs if pair[0] not in OPTIONS]


def chosen_layouts(options: Mapping[str, str]) -> list[str]:
    """Names of the layouts that fit so many GPUs, or of those asked for."""
    wanted = [name for name in options["only"].split(",") if name] or list(LAYOUTS)
    size = int(options["num_gpus"])
    return [name for name in wanted if ParallelConfig(**LAYOUTS[name]).num_processes <= size]


def grpo_arguments(name: str, model: Path, output: Path, device: str) -> list[str]:
    """Of the command `samebit grpo` under a layout."""
    layout = LAYOUTS[name]
    transport = {"placement.transport": "stages"} if layout.get("pipeline", 1) > 1 else {}
    where = {"model.path": model, "output_dir": output, "run_name": name, "device": device}
    parallel = {f"trainer.parallel.{key}": str(value).lower() for key, value in layout.items()}
    settings = where | _SETTINGS | transport | parallel
    return [f"{key}={value}" for key, value in settings.items()]


def run_layout(
    name: str, model: Path, output: Path, device: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """Run it to its end; its part of the report."""
    arguments = [*grpo_arguments(name, model, output, device), *overrides]
    command = [sys.executable, "-P", "-m", "samebit.recipes.cli.main", "grpo", *arguments]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    start = time.perf_counter()
    found: dict[str, Any] = {
        "processes": ParallelConfig(**LAYOUTS[name]).num_processes,
        "parallel": LAYOUTS[name],
    }
    try:
        job = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:  # its processes end with it
        return found | {"failed": f"not done in {TIMEOUT_S} s"}
    found["seconds"] = round(time.perf_counter() - start, 1)
    if job.returncode != 0:
        last = " | ".join(job.stderr.strip().splitlines()[-3:])
        return found | {"failed": f"exit code {job.returncode}: {last}"}
    return found | read_run(output / name)


def read_run(folder: Path) -> dict[str, Any]:
    """What a finished run's files say."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] > 0]
    first = list_rollouts(folder)[1]
    return {
        **summary,
        "steps": len(rows),
        "grad_norm_min": min(row["train/grad_norm"] for row in rows),
        "first_rollout_digest": hashlib.sha256(first.read_bytes()).hexdigest()[:16],
    }


def problems(found: Mapping[str, Mapping[str, Any]], tp_invariant: bool) -> list[str]:
    """What speaks against the promise, in a line each; nothing else may."""
    said, firsts = [], dict[int, tuple[str, str]]()
    for name, run in found.items():
        if failed := run.get("failed"):
            said.append(f"{name}: {failed}")
            continue
        if run["logprob_mismatches"]:
            said.append(f"{name}: {run['logprob_mismatches']} log-probs differ")
        if not run["logprob_tokens_compared"]:
            said.append(f"{name}: no log-prob was compared")
        if not run["grad_norm_min"] > 0:
            said.append(f"{name}: a step trained nothing")
        size = 1 if tp_invariant else run["parallel"].get("tensor", 1)
        other, digest = firsts.setdefault(size, (name, run["first_rollout_digest"]))
        if digest != run["first_rollout_digest"]:
            said.append(f"{name}: its first rollout is not that of {other}")
    return said if found else ["no layout was run"]


def main(out: str, *arguments: str) -> int:
    """Run every layout, write the report."""
    options, overrides = parse(arguments)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        make_model(model)
        names = chosen_layouts(options)
        with ThreadPoolExecutor(int(options["at_once"])) as pool:
            run = partial(
                run_layout,
                model=model,
                output=Path(temporary),
                device=options["device"],
                overrides=overrides,
            )
            for name, result in zip(names, pool.map(run, names), strict=True):
                found[name] = result
                print(f"{name:28s} {json.dumps(result)}", flush=True)
    against = problems(found, "numerics.tp_invariant=true" in overrides)
    total = {
        key: sum(run.get(key, 0) for run in found.values())
        for key in ("logprob_tokens_compared", "logprob_mismatches")
    }
    report = {
        "weights": "random, made on the spot",
        "layouts_run": len(found),
        **total,
        "problems": against,
        "layouts": found,
    }
    write_result(Path(out), resolve_device(options["device"]), report, ["python", *sys.argv])
    print(f"{len(found)} layouts: {json.dumps(total)}")
    for line in against:
        print(f"layouts: {line}", file=sys.stderr)
    return 1 if against else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
