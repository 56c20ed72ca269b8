"""samebit demo: a small model learns to reverse digits, with every part of the project in place."""

import json
import time
from pathlib import Path

from samebit.recipes import grpo, sft
from samebit.recipes.config import DemoRun, GrpoRun, RunSection, SftRun, to_yaml
from samebit.recipes.metrics import write_atomically
from samebit.recipes.session import CONFIG_FILE, clear_run_dir
from samebit.recipes.tiny_model import make_demo_model


def _phase(run: DemoRun, phase: SftRun | GrpoRun, name: str, model: Path) -> None:
    """Give a phase the demo's own settings."""
    shared = RunSection(run_name=name, output_dir=str(run.run_dir))
    for key in ("resume", "overwrite", "device", "cpu_threads", "seed"):
        setattr(shared, key, getattr(run, key))
    for key, value in vars(shared).items():
        setattr(phase, key, value)
    phase.model.path = str(model)


def main(run: DemoRun) -> int:
    """The command `samebit demo`."""
    if run.dry_run:
        print(to_yaml(run))
        return 0
    start = time.perf_counter()
    if not run.resume and run.run_dir.exists():
        clear_run_dir(run.run_dir, run.overwrite)
    run.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run.run_dir / CONFIG_FILE, to_yaml(run))
    model = run.run_dir / "model"
    _phase(run, run.sft, "sft", model)
    _phase(run, run.grpo, "grpo", run.run_dir / "sft" / "model")
    if not (run.resume and (model / "model.safetensors").exists()):
        make_demo_model(model, run.seed)
    if not (run.resume and (run.run_dir / "sft" / "summary.json").exists()):
        sft.train(run.sft)
    summary = grpo.train(run.grpo)
    (run.run_dir / "summary.json").write_text(json.dumps(summary) + "\n")
    compared, unequal = summary["logprob_tokens_compared"], summary["logprob_mismatches"]
    print(
        f"\n{run.run_dir / 'grpo' / 'report.html'} has the curves. Done in "
        f"{time.perf_counter() - start:.0f} s.\nHeld-out reward {summary['reward_first']:.3f} -> "
        f"{summary['reward_last']:.3f}. {compared:,} tokens' log-probs were compared between "
        f"rollout and trainer: {'all were equal' if unequal == 0 else f'{unequal} differ'}."
    )
    print(json.dumps(summary))
    return 0
