"""What every training recipe does around its loop: the folder, checkpoints, the summary."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from samebit.kernels.profile import NumericsProfile, numerics_profile
from samebit.kernels.registry import attention_kind
from samebit.recipes.config import GrpoRun, SftRun
from samebit.recipes.data.tasks.base import Dataset
from samebit.recipes.eagle3_config import Eagle3Run, TrainingRun
from samebit.recipes.launch.launched import is_launched
from samebit.recipes.run.binding import (
    binding_layout,
    bindings,
    bits_changed,
    changes,
    require_same,
    saved_layout,
)
from samebit.recipes.run.folder import CONFIG_FILE, RunFolder, naming, require_free, require_outside
from samebit.recipes.run.input_files import input_files
from samebit.recipes.run.metrics import METRICS_FILE, OWNER_ONLY, SCHEDULE_FILE, missing_step
from samebit.recipes.run.needs import require_ready
from samebit.recipes.run.provenance import record_start
from samebit.recipes.run.run_data import SUMMARY_FILE
from samebit.recipes.run.secrets import to_yaml
from samebit.rollout.device import resolve_device
from samebit.trainer.checkpoint import Checkpoint, CheckpointError, latest_checkpoint
from samebit.trainer.checkpoint_writer import CheckpointWriter, remove_leftovers
from samebit.trainer.config import ParallelConfig
from samebit.trainer.draft.trainer import DraftTrainer
from samebit.trainer.megatron.resharding import WholeState
from samebit.trainer.megatron.setup import start_processes
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import is_first, together
from samebit.weight_sync.disk import make_folder, write_atomically
from samebit.weight_sync.session import non_finite
from samebit.weight_sync.transports.file import require_replaceable


class RunFolderError(RuntimeError):
    """Another process could not open the run's folder; the message is its own."""


@dataclass
class RunSession:
    """Holds a run's folder, its device and the numerics that its checkpoints are bound to.

    A context: at its end the folder is free for others, and if the run has not `started`, it holds
    again what it held before.
    """

    run: TrainingRun
    device: torch.device
    profile: NumericsProfile
    resumed: Checkpoint | None
    is_first: bool
    """Whether this process writes what there is one of."""
    bound: dict[str, Any]
    """What checkpoints are bound to, on the first process."""
    folder: RunFolder | None
    """The first process holds it."""
    writer: CheckpointWriter = field(init=False)
    has_started: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        settings = self.run.trainer
        self.writer = CheckpointWriter(
            self.checkpoints, settings.keep_checkpoints, settings.background_checkpoints
        )

    @property
    def run_dir(self) -> Path:
        """The run's files go here."""
        return self.run.run_dir

    @property
    def checkpoints(self) -> Path:
        """The run's checkpoints go here."""
        return self.run_dir / "checkpoints"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.folder is not None:
            self.folder.close()

    def started(self) -> None:
        """Remove the earlier run, now that all is set up, or what this one said at an earlier end,
        as it goes on. A second call does nothing."""
        if not self.has_started:
            with together(RunFolderError):
                if self.folder is not None:
                    self.folder.started()
                    (self.run_dir / SUMMARY_FILE).unlink(missing_ok=True)
            self.has_started = True

    def save(self, step: int, state: dict[str, Any], progress: dict[str, Any]) -> None:
        """Begin a checkpoint after `step`; `progress` is small and readable, in the manifest."""
        self.started()
        with together(CheckpointError):
            critic = state.get("critic", {}).get("params", {})
            bad = non_finite(state["params"])
            if bad := bad + [f"critic {name}" for name in non_finite(critic)]:
                raise CheckpointError(
                    f"NaN or Inf in {', '.join(bad[:5])} after step {step}; it was not saved, the "
                    "last checkpoint is unharmed"
                )
        manifest = {
            **self.bound,
            "parallel": binding_layout(self.run),
            "resharded": self.resharded,
            "numerics": asdict(self.profile) | {"digest": self.profile.digest},
            "progress": progress,
        }
        self.writer.save(step, state, manifest)

    @property
    def resharded(self) -> list[dict[str, Any]]:
        """The run has come through these changes of layout, each after a step."""
        if self.resumed is None:
            return []
        there, here = saved_layout(self.resumed), binding_layout(self.run)
        change = {"step": self.resumed.step, "changes": changes(there, here)}
        return self.resumed.manifest["resharded"] + ([change] if change["changes"] else [])

    def restore(self, trainer: MegatronTrainer | DraftTrainer) -> dict[str, Any]:
        """Bring the trainer to the resumed checkpoint, if there is one; returns its progress."""
        if self.resumed is None:
            return {}
        there, here = saved_layout(self.resumed), binding_layout(self.run)
        if not changes(there, here) or isinstance(trainer, DraftTrainer):
            trainer.load_state_dict(self.resumed.load())
        else:
            trainer.load_resharded(WholeState(trainer.model, self.resumed.load_all()))
            moved = bits_changed(self.run, there, here)
            if self.is_first:
                print(
                    f"{self.resumed.path} is resharded ({changes(there, here)}): bits are those "
                    f"{'of the new layout from here on' if moved else 'that they would have been'}",
                    file=sys.stderr,
                )
        return self.resumed.manifest["progress"]

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        if self.is_first:
            write_atomically(self.run_dir / SUMMARY_FILE, json.dumps(summary) + "\n")


def open_session(run: TrainingRun, records: Mapping[str, Dataset]) -> RunSession:
    """Make or reopen the run's folder; nothing is removed unless overwrite=true says so.

    records: what the run's checkpoints are bound to the contents of, by name. With several
    processes the first one does all. Raises, before anything is changed, CheckpointError if the
    checkpoint to resume is damaged or belongs to another configuration, data or numerics profile;
    FileExistsError if the folder is another's, FolderInUseError if another process works there; and
    OSError if it cannot be written.
    """
    require_ready(run)
    torch.set_num_threads(run.cpu_threads)
    device, parallel = resolve_device(run.device), run.trainer.parallel
    join_processes(device, parallel)
    profile = profile_of(run, device)
    bound, folder = {}, None
    with together(RunFolderError):
        if is_first():
            bound = bindings(run, command_of(run), records)
            folder = _open_folder(run, device, bound, profile)
    resumed = latest_checkpoint(run.run_dir / "checkpoints") if run.resume else None
    if resumed is not None:  # by the first process, for all
        resumed = replace(resumed, verified=True)
    return RunSession(run, device, profile, resumed, is_first(), bound, folder)


def profile_of(run: TrainingRun, device: torch.device) -> NumericsProfile:
    """What the run's bits depend on besides its inputs."""
    tensor, numerics = run.trainer.parallel.tensor, run.numerics
    kind = attention_kind(numerics.attention)
    return numerics_profile(device, tensor, numerics.tp_invariant, kind)


def join_processes(device: torch.device, parallel: ParallelConfig) -> None:
    """Meet the other processes of the run, if there are any; a second call does nothing."""
    if parallel.num_processes > 1 or is_launched():
        start_processes(device, parallel)


def command_of(run: TrainingRun) -> str:
    """Return the name of the command that runs it."""
    if isinstance(run, SftRun):
        return run.command
    return "grpo" if isinstance(run, GrpoRun) else "eagle3"


def _open_folder(
    run: TrainingRun, device: torch.device, bound: dict[str, Any], profile: NumericsProfile
) -> RunFolder:
    _require_own_model(run)
    folder = RunFolder(run.run_dir, command_of(run))
    try:
        checkpoints = run.run_dir / "checkpoints"
        resumed = latest_checkpoint(checkpoints) if run.resume else None
        if resumed is not None:
            require_same(resumed, run, bound, profile)
            resumed.verify()
            _require_rows(run, resumed.step)
        folder.begin(resume=run.resume, overwrite=run.overwrite, inputs=input_files(run))
        with naming(run.run_dir):
            make_folder(checkpoints)
            remove_leftovers(checkpoints)
            write_atomically(checkpoints / ".probe", "")  # better now than at the first checkpoint
            (checkpoints / ".probe").unlink()
            write_atomically(run.run_dir / CONFIG_FILE, to_yaml(run), OWNER_ONLY)
            record_start(run.run_dir, device, 0 if resumed is None else resumed.step)
    except BaseException:
        folder.close()
        raise
    return folder


def require_startable(run: TrainingRun) -> None:
    """For a dry run: refuse what open_session would of a folder to replace or to go on in."""
    if run.overwrite or run.resume:
        require_free(
            run.run_dir,
            command_of(run),
            resume=run.resume,
            overwrite=run.overwrite,
            inputs=input_files(run),
        )
    _require_own_model(run)


def require_resumable(run: TrainingRun, records: Mapping[str, Dataset]) -> None:
    """For a dry run: refuse what open_session would of a checkpoint, whose state is not read.

    records: as for open_session.
    """
    resumed = latest_checkpoint(run.run_dir / "checkpoints") if run.resume else None
    if resumed is not None:
        profile = profile_of(run, resolve_device(run.device))
        require_same(resumed, run, bindings(run, command_of(run), records), profile)
        _require_rows(run, resumed.step)


def has_schedule(run: TrainingRun) -> bool:
    """Return whether the run writes a schedule."""
    return isinstance(run, GrpoRun) and run.rollout.has_schedule


def _require_rows(run: TrainingRun, step: int) -> None:
    """What a run that goes on after `step` writes none of again: CheckpointError for rows that are
    gone."""
    for name in (METRICS_FILE, *([SCHEDULE_FILE] if has_schedule(run) else [])):
        file = run.run_dir / name
        if missing := missing_step(file, step):
            raise CheckpointError(
                f"{file} has no row of step {missing}; the run goes on after step {step}, and the "
                "file must have all rows until then, as they were written"
            )


def _require_own_model(run: TrainingRun) -> None:
    """What a run writes at its end: neither over what it reads nor over another's."""
    trains_draft = isinstance(run, Eagle3Run) or (isinstance(run, GrpoRun) and run.draft.is_online)
    if run.resume and (trains_draft or not isinstance(run, GrpoRun)):
        out = run.run_dir / ("draft" if trains_draft else "model")
        require_outside(out, input_files(run), "which the run's export replaces")
        require_replaceable(out)
