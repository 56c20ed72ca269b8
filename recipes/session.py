"""What every training recipe does around its loop: folder, checkpoints, summary."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from samebit.kernels.profile import NumericsProfile, numerics_profile
from samebit.recipes.compose import to_dict, to_yaml
from samebit.recipes.config import GrpoRun, RunSection, SftRun
from samebit.recipes.launch import is_launched
from samebit.recipes.metrics import MetricsLogger, NoLogger, write_atomically
from samebit.recipes.signals import Stopped
from samebit.rollout.config import resolve_device
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.checkpoint import Checkpoint, CheckpointError, latest_checkpoint
from samebit.trainer.checkpoint_writer import CheckpointWriter, remove_leftovers
from samebit.trainer.megatron.resharding import WholeState
from samebit.trainer.megatron.setup import start_processes
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import is_first, together
from samebit.weight_sync.session import non_finite

CONFIG_FILE = "config.yaml"

# Keys that a resumed run may change: none of them can change a result but reshard, which asks to.
_FREE_KEYS = (
    "resume",
    "reshard",
    "overwrite",
    "dry_run",
    "run_name",
    "output_dir",
    "engine",
    "logger",
    "device",
)
_FREE_TRAINER_KEYS = ("checkpoint_every", "keep_checkpoints", "background_checkpoints")
_FREE_SECTION_KEYS = {"data": ("overlong_prompts",), "reward": ("timeout_s", "num_workers")}
_FREE_PARALLEL_KEYS = ("recompute", "offload_optimizer")


class RunFolderError(RuntimeError):
    """Another process could not open the run's folder; the message is its own."""


class HasStep(Protocol):
    """A recipe's progress."""

    step: int


@dataclass
class Session:
    """A run's folder, its device and the numerics that its checkpoints are bound to."""

    run: SftRun | GrpoRun
    device: torch.device
    profile: NumericsProfile
    resumed: Checkpoint | None
    is_first: bool
    """Whether this process writes what there is one of."""
    writer: CheckpointWriter = field(init=False)

    def __post_init__(self) -> None:
        settings = self.run.trainer
        self.writer = CheckpointWriter(
            self.checkpoints, settings.keep_checkpoints, settings.background_checkpoints
        )

    @property
    def run_dir(self) -> Path:
        """Where the run's files go."""
        return self.run.run_dir

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints go."""
        return self.run_dir / "checkpoints"

    def save(self, step: int, state: dict[str, Any], progress: dict[str, Any]) -> None:
        """Begin a checkpoint after `step`; `progress` is small and readable, in the manifest."""
        with together(CheckpointError):
            if bad := non_finite(state["params"]):
                raise CheckpointError(
                    f"NaN or Inf in {', '.join(bad[:5])} after step {step}; it was not saved, the "
                    "last checkpoint is unharmed"
                )
        manifest = {
            "config_digest": config_digest(self.run),
            "model_digest": model_digest(self.run),
            "parallel": binding_layout(self.run),
            "resharded": self.resharded,
            "numerics": asdict(self.profile) | {"digest": self.profile.digest},
            "progress": progress,
        }
        self.writer.save(step, state, manifest)

    @contextmanager
    def saving(self, progress: HasStep, save: Callable[[], object]) -> Iterator[None]:
        """At the block's end its checkpoints are whole. If it is stopped, `save` the last whole
        step unless it is saved, and say so."""
        try:
            yield
            self.writer.finish()
        except Stopped as stopped:
            self.writer.finish()
            newest = latest_checkpoint(self.checkpoints)
            if progress.step > 0 and (newest is None or newest.step < progress.step):
                save()
                self.writer.finish()
            where = f"saved in {self.checkpoints}" if progress.step > 0 else "nothing to save"
            raise Stopped(
                f"{stopped}: stopped after step {progress.step}, {where}; resume=true goes on"
            ) from None
        except BaseException:
            self.writer.close()
            raise

    @property
    def resharded(self) -> list[dict[str, Any]]:
        """The changes of layout that the run has come through, with the steps after which."""
        if self.resumed is None:
            return []
        there, here = self.resumed.manifest["parallel"], binding_layout(self.run)
        change = {"step": self.resumed.step, "changes": _changes(there, here)}
        return self.resumed.manifest["resharded"] + ([change] if change["changes"] else [])

    def restore(self, trainer: MegatronTrainer) -> dict[str, Any]:
        """Bring the trainer to the checkpoint that is resumed; its progress, else nothing."""
        if self.resumed is None:
            return {}
        there, here = self.resumed.manifest["parallel"], binding_layout(self.run)
        if there == here:
            trainer.load_state_dict(self.resumed.load())
        else:
            trainer.load_resharded(WholeState(trainer.model, self.resumed.load_all()))
            if self.is_first:
                print(
                    f"{self.resumed.path} is resharded ({_changes(there, here)}): bits are those "
                    "of the new layout from here on",
                    file=sys.stderr,
                )
        return self.resumed.manifest["progress"]

    def logger(self, progress: HasStep) -> MetricsLogger | NoLogger:
        """The run's metrics, which the first process writes, from the present step on."""
        if not self.is_first:
            return NoLogger()
        resume_step = progress.step if self.resumed is not None else None
        run = self.run
        return MetricsLogger(self.run_dir, run.logger, run.run_name, to_dict(run), resume_step)

    def bar(self, progress: HasStep) -> tqdm:
        """A bar of the run's steps."""
        return tqdm(
            total=self.run.trainer.num_steps,
            initial=progress.step,
            desc=self.run.run_name,
            unit="step",
            disable=not self.is_first,
        )

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        if self.is_first:
            write_atomically(self.run_dir / "summary.json", json.dumps(summary) + "\n")


def binding_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a resolved configuration, every key that a result depends on."""
    kept = {k: v for k, v in config.items() if k not in _FREE_KEYS}
    for section, free in _FREE_SECTION_KEYS.items():
        if section in kept:
            kept[section] = {k: v for k, v in kept[section].items() if k not in free}
    if config["data"]["overlong_prompts"] != "error":  # which leaves every record as it is
        kept["data"]["overlong_prompts"] = config["data"]["overlong_prompts"]
    trainer = {k: v for k, v in config["trainer"].items() if k not in _FREE_TRAINER_KEYS}
    if trainer["optimizer"]["lr_schedule"] == "constant":
        del trainer["num_steps"]  # a run may be made longer
    layout = {k: v for k, v in trainer["parallel"].items() if k not in _FREE_PARALLEL_KEYS}
    return kept | {"trainer": trainer | {"parallel": layout}}


def binding_layout(run: SftRun | GrpoRun) -> dict[str, Any]:
    """Of trainer.parallel, every key that bits or the files of a checkpoint depend on."""
    return binding_config(to_dict(run))["trainer"]["parallel"]


def config_digest(run: RunSection) -> str:
    """A digest of every key that a result depends on; the layout is compared by itself."""
    config = binding_config(to_dict(run))
    del config["trainer"]["parallel"]
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_digest(run: RunSection) -> str:
    """A digest of what the numerics read in the model's config.json."""
    model = asdict(load_model_config(to_dict(run)["model"]["path"]))
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:16]


def open_session(run: SftRun | GrpoRun) -> Session:
    """Make or reopen the run's folder; nothing is removed unless overwrite=true says so.

    With several processes the first one does. Raises, before anything is changed, CheckpointError
    if the checkpoint to resume is damaged or belongs to another configuration or numerics profile,
    FileExistsError if the folder is in use; and OSError if the folder cannot be written.
    """
    torch.set_num_threads(run.cpu_threads)
    device, parallel = resolve_device(run.device), run.trainer.parallel
    if parallel.num_processes > 1 or is_launched():
        start_processes(device, parallel)
    profile = numerics_profile(device, parallel.tensor, run.numerics.tp_invariant)
    checkpoints = run.run_dir / "checkpoints"
    with together(RunFolderError):
        if is_first():
            _open_folder(run, profile, checkpoints)
    resumed = latest_checkpoint(checkpoints) if run.resume else None
    if resumed is not None:  # by the first process, for all
        resumed = replace(resumed, verified=True)
    return Session(run, device, profile, resumed, is_first())


def _open_folder(run: SftRun | GrpoRun, profile: NumericsProfile, checkpoints: Path) -> None:
    resumed = latest_checkpoint(checkpoints) if run.resume else None
    if resumed is not None:
        _require_same(resumed, run, profile)
        resumed.verify()
    elif not run.resume and run.run_dir.exists():
        clear_run_dir(run.run_dir, run.overwrite)
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(checkpoints)
        write_atomically(checkpoints / ".probe", "")  # better now than at the first checkpoint
        (checkpoints / ".probe").unlink()
        write_atomically(run.run_dir / CONFIG_FILE, to_yaml(run))
    except OSError as error:
        raise OSError(f"the run's folder {run.run_dir} cannot be written: {error}") from error


def clear_run_dir(run_dir: Path, overwrite: bool) -> None:
    """Remove what an earlier run left, but only if asked to, and nothing else."""
    if not any(run_dir.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{run_dir} is not empty; give resume=true to go on with its run, another run_name, or "
            "overwrite=true"
        )
    if not (run_dir / CONFIG_FILE).exists():
        raise FileExistsError(
            f"{run_dir} holds no {CONFIG_FILE}: no run made it, so overwrite=true removes nothing"
        )
    doomed = run_dir.with_name(f".{run_dir.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    run_dir.rename(doomed)  # a kill during the removal leaves nothing half there
    shutil.rmtree(doomed)


def _require_same(checkpoint: Checkpoint, run: SftRun | GrpoRun, profile: NumericsProfile) -> None:
    checkpoint.require("config_digest", config_digest(run), "configuration")
    checkpoint.require("model_digest", model_digest(run), "model configuration")
    done, total = checkpoint.manifest["progress"]["step"], run.trainer.num_steps
    if total < done:
        raise CheckpointError(
            f"{checkpoint.path} was written after step {done}; trainer.num_steps is {total}: give "
            f"at least {done}"
        )
    there, here = checkpoint.manifest["parallel"], binding_layout(run)
    if there != here and not run.reshard:
        raise CheckpointError(
            f"{checkpoint.path} was written under another trainer.parallel "
            f"({_changes(there, here)}); with reshard=true the run goes on, with other bits"
        )
    resharded = {"tp_size": profile.tp_size} if run.reshard else {}
    there, here = checkpoint.manifest["numerics"] | resharded, asdict(profile)
    if changes := _changes(there, here):
        raise CheckpointError(
            f"{checkpoint.path} was written under another numerics profile, so bits would differ: "
            f"{changes}"
        )


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {there.get(k)} -> {v}" for k, v in here.items() if there.get(k) != v)
