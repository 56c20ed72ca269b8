"""samebit demo: a small model learns while you watch, with every part of the project in place.

Under a parallel layout every process runs both phases; the first one alone makes the folder, the
model and what is printed.
"""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from samebit.recipes import fetch_smollm2, grpo, sft
from samebit.recipes.config import ConfigError, GrpoRun, RunSection, SftRun
from samebit.recipes.data.reward_pool import load_reward
from samebit.recipes.data.tasks.registry import load_datasets
from samebit.recipes.demo_config import DemoRun
from samebit.recipes.models.tiny_model import make_demo_model
from samebit.recipes.run.folder import CONFIG_FILE, InputFiles, RunFolder
from samebit.recipes.run.input_files import input_files
from samebit.recipes.run.inputs import GrpoInputs
from samebit.recipes.run.metrics import OWNER_ONLY
from samebit.recipes.run.needs import require_ready
from samebit.recipes.run.secrets import to_yaml
from samebit.recipes.run.session import RunFolderError, join_processes
from samebit.rollout.device import resolve_device
from samebit.trainer.ranks import is_first, together
from samebit.weight_sync.disk import write_atomically
from samebit.weight_sync.folders import replacing


def _phase(run: DemoRun, phase: SftRun | GrpoRun, name: str, model: Path) -> None:
    """Give a phase the demo's own settings."""
    for field in fields(RunSection):
        setattr(phase, field.name, getattr(run, field.name))
    phase.run_name, phase.output_dir = name, str(run.run_dir)
    phase.model.path = str(model)


def _find_weights() -> Path:
    """SmolLM2's file; ConfigError says how to get it or to do without."""
    try:
        return fetch_smollm2.find_gguf(None)
    except ConfigError as error:
        raise ConfigError(f"{error}; or give device=cpu for the tiny model") from error


def _make_model(run: DemoRun, folder: Path) -> None:
    """Write the model that the demo starts from; a folder of that name is whole."""
    with replacing(folder) as new:
        if run.model == "smollm2":
            fetch_smollm2.write_folder(_find_weights(), new)
        else:
            make_demo_model(new, run.seed)


def _check(run: DemoRun) -> Iterator[tuple[str, Path]]:
    """Read what both phases read besides the model; gives the files that they read."""
    if run.model == "smollm2":
        _find_weights()
    load_reward(run.grpo.reward).close()
    for name, phase in (("sft", run.sft), ("grpo", run.grpo)):
        if phase is not None:
            load_datasets(phase.data)
            yield from ((f"{name}.{key}", file) for key, file in input_files(phase))


def _begin(run: DemoRun, inputs: InputFiles, folder: RunFolder) -> None:
    """Take the folder and write into it what both phases begin with."""
    folder.begin(resume=run.resume, overwrite=run.overwrite, inputs=inputs)
    if not (run.run_dir / CONFIG_FILE).exists():
        write_atomically(run.run_dir / CONFIG_FILE, to_yaml(run), OWNER_ONLY)
    if not (run.run_dir / "model").exists():
        _make_model(run, run.run_dir / "model")


def _train(run: DemoRun, folder: RunFolder | None) -> dict[str, Any]:
    """Both phases, in a folder that is the demo's and that the first process holds; the summary."""
    started = (lambda: None) if folder is None else folder.started
    model = run.run_dir / "model"
    _phase(run, run.grpo, "grpo", model)
    if run.sft is not None:
        GrpoInputs(run.grpo).close()  # the second phase is to fail before the first one has run
        _phase(run, run.sft, "sft", model)
        sft.train(run.sft, started)  # a finished one accepts the configuration, or not
        run.grpo.model.path = str(run.run_dir / "sft" / "model")
    summary = grpo.train(run.grpo, started)
    if is_first():
        write_atomically(run.run_dir / CONFIG_FILE, to_yaml(run), OWNER_ONLY)
        write_atomically(run.run_dir / "summary.json", json.dumps(summary) + "\n")
    return summary


def _tell(run: DemoRun, summary: dict[str, Any], seconds: float) -> None:
    compared, unequal = summary["logprob_tokens_compared"], summary["logprob_mismatches"]
    print(
        f"\n{run.run_dir / 'grpo' / 'report.html'} has the curves. Done in {seconds:.0f} s.\n"
        f"Held-out reward {summary['reward_first']:.3f} -> {summary['reward_last']:.3f}. "
        f"{compared:,} tokens' log-probs were compared between rollout and trainer: "
        f"{'all were equal' if unequal == 0 else f'{unequal} differ'}."
    )
    print(json.dumps(summary))


def main(run: DemoRun) -> int:
    """Run the command `samebit demo`."""
    device = resolve_device(run.device)
    require_ready(run)
    inputs = list(_check(run))
    if run.dry_run:
        print(f"# model: {run.model}, on {device.type}\n{to_yaml(run)}")
        return 0
    start = time.perf_counter()
    join_processes(device, run.grpo.trainer.parallel)
    with ExitStack() as stack:
        folder = None
        with together(RunFolderError):
            if is_first():
                folder = stack.enter_context(RunFolder(run.run_dir, "demo"))
                _begin(run, inputs, folder)
        summary = _train(run, folder)
    if is_first():
        _tell(run, summary, time.perf_counter() - start)
    return 0
