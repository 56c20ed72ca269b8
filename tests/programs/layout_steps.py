"""Colocated GRPO steps of a shape under layouts of several GPUs: bits, seconds by phase, memory.

    python tests/programs/layout_steps.py OUT.json [device=cuda] [shape=FOLDER] [steps=3]
        [prompts=64] [samples=8] [length=512] [layouts=tensor:2+data:4,tensor:4+pipeline:2]
        [ARGUMENT ...]

shape: a Hugging Face folder of which config.json is read, Qwen3-8B's by default; weights are random
and made on the spot. Each layout is `samebit grpo` in as many processes as it has, with sequence
parallelism beside tensor parallelism: so many prompts and samples of `length` tokens each, and a
reward that random models earn in many sizes. It is killed after its last step: what it would save
is of no use. The first of its steps captures graphs and compiles, and is left out of the times.
ARGUMENTs go to the command. Exit code 1 unless log-probs were compared in every step, none
differed, and every step trained something.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colocated_step import medians, steps_of

from samebit.recipes.models.tiny_model import write_character_tokenizer, write_weights
from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import resolve_device, resolve_dtype
from samebit.rollout.models.decoder import DenseModel
from samebit.rollout.models.registry import load_model_config

HERE = Path(__file__).resolve().parent
"""On the search path of the runs, whose reward is a function of a file in it."""
OPTIONS = {
    "device": "cuda",
    "shape": str(HERE.parents[1] / "recipes/bench/shapes/qwen3-8b"),
    "steps": "3",
    "prompts": "64",
    "samples": "8",
    "length": "512",
    "layouts": "tensor:2+data:4,tensor:4+pipeline:2",
}
_FIXED = [
    "data=reverse_digits", "data.size=1000000", "data.eval_size=1", "rollout.eval_every=1000",
    "reward.name=layouts:odd_characters", "logger=disabled", "trainer.checkpoint_every=0",
]  # fmt: skip
_FIRST_CHARACTER = 0x10000  # of those that are no digits


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options over their defaults, and what is grpo's."""
    pairs = [argument.partition("=") for argument in arguments]
    own = {key: value for key, _, value in pairs if key in OPTIONS}
    return OPTIONS | own, ["".join(pair) for pair in pairs if pair[0] not in OPTIONS]


def sizes_of(layout: str) -> dict[str, int]:
    """tensor:2+data:4 as numbers by name; ValueError for what is no such list."""
    parts = [part.partition(":") for part in layout.split("+")]
    if not all(key.isidentifier() and size.isdecimal() for key, _, size in parts):
        raise ValueError(f"layouts: '{layout}' is not NAME:SIZE+NAME:SIZE, as in tensor:2+data:4")
    return {key: int(size) for key, _, size in parts}


def make_folder(shape: Path, folder: Path) -> DenseModel:
    """A model of the shape with random weights, whose every token is a character."""
    folder.mkdir()
    shutil.copy(shape / "config.json", folder)
    config = load_model_config(folder)
    if not isinstance(config, DenseModel):
        raise ValueError(f"shape={shape}: it must be a dense model's")
    digits = "0123456789="
    rest = range(_FIRST_CHARACTER, _FIRST_CHARACTER + config.vocab_size - 1 - len(digits))
    write_character_tokenizer(folder, digits + "".join(map(chr, rest)))
    write_weights(folder, seed=1)
    return config


def command_of(
    layout: str, model: Path, work: Path, options: Mapping[str, str], own: Sequence[str]
) -> list[str]:
    """`samebit grpo` under a layout."""
    sizes, length = sizes_of(layout), int(options["length"])
    transport = "stages" if sizes.get("pipeline", 1) > 1 else "alias"
    return [
        sys.executable, "-P", "-m", "samebit.recipes.cli.main", "grpo", *_FIXED,
        f"model.path={model}", f"output_dir={work}", f"run_name={layout}",
        f"device={options['device']}", f"data.args.length={length - 1}",
        f"rollout.prompts_per_step={options['prompts']}",
        f"rollout.samples_per_prompt={options['samples']}", f"rollout.max_prompt_len={length}",
        f"rollout.max_new_tokens={length}", f"trainer.num_steps={int(options['steps']) + 2}",
        f"trainer.micro_batch_tokens={16 * length}", f"placement.transport={transport}",
        *(f"trainer.parallel.{key}={size}" for key, size in sizes.items()),
        f"trainer.parallel.sequence={str(sizes.get('tensor', 1) > 1).lower()}", *own,
    ]  # fmt: skip


def run_layout(
    layout: str, model: Path, work: Path, options: Mapping[str, str], own: Sequence[str]
) -> dict[str, Any]:
    """The steps of a layout, without the first."""
    command = command_of(layout, model, work, options, own)
    metrics = work / layout / "metrics.jsonl"
    rows = steps_of(command, metrics, int(options["steps"]) + 1, work / f"{layout}.log")
    return {
        "command": command[4:],
        "steps": len(rows),
        **medians(rows),
        "logprobs_compared": [row.get("train/logprob_tokens_compared", 0) for row in rows],
        "logprob_mismatches": sum(row.get("train/logprob_mismatches", 0) for row in rows),
        "grad_norm_min": min(row.get("train/grad_norm", 0.0) for row in rows),
    }


def problems(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What speaks against the promise, in a line each."""
    said = []
    for layout, run in found.items():
        if run["logprob_mismatches"]:
            said.append(f"{layout}: {run['logprob_mismatches']} log-probs differ")
        if not all(run["logprobs_compared"]):
            said.append(f"{layout}: a step compared no log-prob")
        if not run["grad_norm_min"] > 0:
            said.append(f"{layout}: a step trained nothing")
    return said if found else ["no layout was run"]


def main(out: str, *arguments: str) -> int:
    """Run every layout, write the report."""
    options, own = parse(arguments)
    layouts = [layout for layout in options["layouts"].split(",") if layout]
    for layout in layouts:
        sizes_of(layout)
    device = resolve_device(options["device"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    found: dict[str, dict[str, Any]] = {}
    report = {"shape": Path(options["shape"]).name, "weights": "random", "layouts": found}
    with tempfile.TemporaryDirectory(prefix="samebit_layouts_") as work:
        model = Path(work) / "model"
        kv_layout = make_folder(Path(options["shape"]), model).kv_layout
        token_bytes = kv_layout.bytes_per_token(resolve_dtype(None, device))
        for layout in layouts:
            run = found[layout] = run_layout(layout, model, Path(work), options, own)
            gib = run.get("perf/rollout_kv_cache_gib", 0.0) * sizes_of(layout).get("tensor", 1)
            run["kv_tokens"] = int(gib * 2**30 / token_bytes)
            print(layout, json.dumps({k: v for k, v in run.items() if k != "command"}, indent=1))
            write_result(Path(out), device, report, ["python", *sys.argv])
    against = problems(found)
    if against:
        print("\n".join(against), file=sys.stderr)
    return 1 if against else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
