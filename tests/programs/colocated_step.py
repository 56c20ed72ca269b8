"""A colocated GRPO step on one device, phase by phase, with and without memory that changes hands.

    python tests/programs/colocated_step.py OUT.json [steps=4] [layers=28] [ARGUMENT ...]

Random weights of Qwen3-1.7B's shape (fewer layers: a smaller one), 64 prompts of 512 tokens, 8
samples of 512 each. Every run is `samebit grpo` in a process of its own, which is killed after its
last step: what it would save is of no use. ARGUMENTs go to the command. The first step captures
graphs and compiles: it is left out. Exit code 1 unless switching and syncing take at most 0.5 s and
2% of a step.
"""

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from samebit.recipes.models.tiny_model import (
    write_character_tokenizer,
    write_config,
    write_weights,
)
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import resolve_device, resolve_dtype
from samebit.rollout.models.registry import load_model_config

COMMAND = [
    "data=reverse_digits", "data.args.length=511", "data.size=1000000", "data.eval_size=1",
    "rollout.prompts_per_step=64", "rollout.samples_per_prompt=8", "rollout.max_prompt_len=512",
    "rollout.max_new_tokens=512", "rollout.eval_every=1000",
    "trainer.micro_batch_tokens=8192", "trainer.checkpoint_every=0", "logger=disabled",
    "engine.max_num_seqs=512", "engine.max_batch_tokens=8192", "reward=number_match",
]  # fmt: skip
SWITCHES = ("perf/switch_to_train_s", "perf/switch_to_rollout_s", "perf/sync_s")


def make_folder(folder: Path, layers: int) -> None:
    """Write a model of the shape, with random weights."""
    write_character_tokenizer(folder, "0123456789=")
    write_config(
        folder, "qwen3", hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=True, max_position_embeddings=40960, torch_dtype="bfloat16",
    )  # fmt: skip
    write_weights(folder, seed=1)


def steps_of(command: list[str], metrics: Path, steps: int, log: Path) -> list[dict[str, Any]]:
    """Run the command until so many steps are logged; returns their rows but the first."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                rows = read_rows(metrics) if metrics.exists() else []
                done = [row for row in rows if "perf/train_s" in row]
                if len(done) >= steps:
                    return done[1:]
                time.sleep(0.2)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    raise RuntimeError(f"{' '.join(command)} ended: {log.read_text()[-2000:]}")


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of every figure of time and memory."""
    keys = sorted({key for row in rows for key in row if key.startswith("perf/")})
    return {key: statistics.median(row[key] for row in rows if key in row) for key in keys}


def main(arguments: list[str]) -> int:
    """Run both and compare; returns the exit code."""
    out, *rest = arguments
    options = {"steps": "4", "layers": "28"}
    options |= dict(a.split("=", 1) for a in rest if a.split("=")[0] in options)
    own = [a for a in rest if a.split("=")[0] not in options]
    device, report = resolve_device(None), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="samebit_step_") as work:
        folder = Path(work) / "model"
        make_folder(folder, int(options["layers"]))
        layout = load_model_config(folder).kv_layout
        token_bytes = layout.bytes_per_token(resolve_dtype(None, device))
        for name, release in (("with release", "true"), ("without", "false")):
            place = [f"model.path={folder}", f"output_dir={work}", f"run_name={release}"]
            command = [sys.executable, "-m", "samebit.recipes.cli.main", "grpo", *place, *COMMAND]
            command += [f"placement.release_memory={release}", *own]
            command.append(f"trainer.num_steps={int(options['steps']) + 1}")
            metrics = Path(work) / release / "metrics.jsonl"
            rows = steps_of(command, metrics, int(options["steps"]), Path(work) / f"{release}.log")
            found = report[name] = {"command": command[2:], "steps": len(rows), **medians(rows)}
            found["step_s"] = statistics.median(row["perf/step_s"] for row in rows)
            found["switching_s"] = sum(found[key] for key in SWITCHES)
            found["switching_fraction"] = found["switching_s"] / found["step_s"]
            found["kv_tokens"] = int(found["perf/rollout_kv_cache_gib"] * 2**30 / token_bytes)
            print(name, json.dumps({k: v for k, v in found.items() if k != "command"}, indent=1))
            write_result(Path(out), device, report, ["python", *sys.argv])
    ours = report["with release"]
    return 0 if ours["switching_s"] <= 0.5 and ours["switching_fraction"] <= 0.02 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
