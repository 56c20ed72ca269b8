"""What a run measured: metrics.jsonl and samples.jsonl in its folder, mirrored to wandb and
TensorBoard; and beside them its schedule, if it has one of its own."""

import hashlib
import json
import math
import numbers
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from samebit.recipes.run.secrets import HIDDEN
from samebit.trainer.config import require, require_default
from samebit.weight_sync.disk import make_folder, naming_file, naming_path, write_atomically

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SCHEDULE_FILE = "schedule.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
SPECULATION = "rollout/spec_"
"""What the keys of speculation begin with."""
WANDB_MODES = ("disabled", "offline", "online")
OWNER_ONLY = 0o600
"""The mode of files that hold a configuration: what is in it may be nobody else's business."""


@dataclass(kw_only=True)
class LoggerConfig:
    """Says what is logged beside metrics.jsonl."""

    wandb: str = "offline"
    """`disabled`, `offline` (files in the run folder, for `wandb sync`) or `online`."""
    project: str = "samebit"
    """The wandb project."""
    tensorboard: bool = False
    """Write what is a number to tensorboard/ in the run's folder, too, for TensorBoard."""
    num_samples: int = 8
    """Completions kept at each evaluation: so many of it, and of the training step before it."""
    save_rollouts: bool = False
    """grpo: keep every drawn token and its log-prob in rollouts/, for `samebit diff`."""

    def __post_init__(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ValueError(
                f"logger.wandb is {self.wandb!r}; give one of {', '.join(WANDB_MODES)}"
            )
        if self.num_samples < 0:
            raise ValueError(f"logger.num_samples is {self.num_samples}; give 0 or more")
        fits = 0 < len(self.project) <= 128 and not set("/\\#?%:") & set(self.project)
        meaning = "a name that wandb takes: 1 to 128 characters, none of / \\ # ? % :"
        require(fits, "logger.project", self.project, meaning)
        if self.wandb == "disabled":
            require_default(self, "logger", ("project",), "logger.wandb is 'disabled'")


class WandbError(RuntimeError):
    """wandb could not start, or ended with an error."""


class MetricsLogger:
    """Appends a run's metrics and sample completions, each line flushed as it is written.

    With `resume_step`, the files are first cut back to the rows up to that step, and a last line
    torn by a kill is dropped; with None they start empty. wandb keeps rows past that step;
    TensorBoard is told to hide them.
    Raises ValueError for a damaged line that is not the last.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggerConfig,
        run_name: str,
        resolved_config: dict[str, Any],
        resume_step: int | None,
        has_schedule: bool = False,
    ) -> None:
        make_folder(run_dir)
        files = [METRICS_FILE, SAMPLES_FILE, *([SCHEDULE_FILE] if has_schedule else [])]
        for name in files:
            _truncate(run_dir / name, resume_step)
        self._num_samples = config.num_samples
        self._files = {name: (run_dir / name).open("a", encoding="ascii") for name in files}
        self._wandb: Any = None
        if config.wandb != "disabled":
            resume = resume_step is not None
            self._wandb = _start_wandb(run_dir, config, run_name, resolved_config, resume)
        self._tensorboard: Any = None
        if config.tensorboard:
            self._tensorboard = _start_tensorboard(run_dir, resume_step)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write one row. Values are finite numbers, written exactly, or texts.

        Raises ValueError, naming the key, for any other value and for the key `step`.
        """
        if "step" in metrics:
            raise ValueError("the metric key 'step' is taken; rename it")
        row = {"step": step} | {key: _plain(key, value) for key, value in metrics.items()}
        self._append(METRICS_FILE, [row])
        if self._wandb is not None:
            # A resumed run goes back: what its server has of those steps is the same, and stays.
            self._wandb.log(row, step=step)
        if self._tensorboard is not None:
            with naming_path(self._tensorboard.log_dir):
                for key in metrics:
                    if not isinstance(row[key], str):
                        self._tensorboard.add_scalar(key, row[key], step)
                self._tensorboard.flush()

    def log_samples(self, step: int, kind: str, rows: list[dict[str, Any]]) -> None:
        """Write the first `num_samples` rows, each with its step and kind ("eval", "train").

        Raises ValueError for a row with a key `step` or `kind`, or with a NaN or infinity in it.
        """
        kept = rows[: self._num_samples]
        for row in kept:
            if taken := sorted({"step", "kind"} & row.keys()):
                raise ValueError(f"the sample keys {taken} are taken; rename them")
            for key, value in row.items():
                if isinstance(value, float):
                    _plain(key, value)
        self._append(SAMPLES_FILE, [{"step": step, "kind": kind} | row for row in kept])

    def log_schedule(self, row: dict[str, Any]) -> None:
        """Write a step's row of the schedule (recipes/run/schedule.py), if the run has one."""
        self._append(SCHEDULE_FILE, [row])

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with naming_file(self._files[name]) as file:
            for row in rows:
                file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()

    def sync(self) -> None:
        """Return once the rows are on the disk: a checkpoint must not outlive them."""
        for each in self._files.values():
            with naming_file(each) as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files and finish the mirrors. A second call does nothing."""
        for each in self._files.values():
            with naming_file(each) as file:
                file.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        if self._tensorboard is not None:
            with naming_path(self._tensorboard.log_dir):
                self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def is_repeated(key: str) -> bool:
    """Whether equal runs log the same under this key: neither times nor what guesses came to, which
    depends on what ran beside them."""
    return not key.startswith(("perf/", SPECULATION))


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without what differs between equal runs."""
    return [{k: v for k, v in row.items() if is_repeated(k)} for row in rows]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file, none if it is missing. A torn last line is left out.

    Raises ValueError, naming the line, for any other line that is not a JSON object with a `step`.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # A whole file ends in a newline, so what follows the last one is empty or torn.
    last = len(lines) - 1
    while last > 0 and not lines[last].strip():
        last -= 1
    rows = []
    for index, line in enumerate(lines[: last + 1]):
        try:
            rows.append(read_row(line, f"{path}, line {index + 1}"))
        except ValueError:
            if index < last:
                raise
    return rows


def read_row(line: bytes, name: str) -> dict[str, Any]:
    """Return a line's row. Raises ValueError, which calls the line by its name, unless it is a JSON
    object with a `step`."""
    row = read_object(line, name)
    if isinstance(step := row.get("step"), bool) or not isinstance(step, int):
        raise ValueError(f"{name} is damaged: no whole number `step`")
    return row


def read_object(content: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object that bytes are. Raises ValueError, which calls them by their name, for
    anything else, NaN and infinity too."""
    try:
        found = json.loads(content, parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is damaged: it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} is damaged: no JSON object")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which no run writes")


def missing_step(path: Path, last: int) -> int | None:
    """Return the first of the steps 1 to `last` that a .jsonl file has no row of; see read_rows."""
    there = {row["step"] for row in read_rows(path)}
    return next((step for step in range(1, last + 1) if step not in there), None)


def _truncate(path: Path, resume_step: int | None) -> None:
    rows = [] if resume_step is None else read_rows(path)
    kept = [row for row in rows if resume_step is not None and row["step"] <= resume_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def _plain(key: str, value: Any) -> Any:
    """A text, int or float that JSON holds exactly. Raises ValueError naming the key."""
    if isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"the metric {key!r} is {value!r:.80}; log a finite number or a text")
    return float(value)


def _start_wandb(
    run_dir: Path,
    config: LoggerConfig,
    run_name: str,
    resolved_config: dict[str, Any],
    resume: bool,
) -> Any:
    import wandb

    mode: Any = config.wandb  # checked against WANDB_MODES, which wandb declares as literals
    # The digest keeps names apart that the allowed characters make alike.
    digest = hashlib.sha256(run_name.encode()).hexdigest()[:8]
    (run_dir / "wandb").mkdir(mode=0o700, exist_ok=True)  # the configuration is in it
    try:
        run = wandb.init(
            project=config.project,
            name=run_name,
            id=re.sub(r"[^A-Za-z0-9_-]+", "-", run_name)[:64] + f"-{digest}",
            resume="allow" if resume else None,
            dir=run_dir,
            mode=mode,
            config=resolved_config,
            settings=wandb.Settings(
                silent=True,
                console="off",
                # That is the machine, and the command line with the secrets in it.
                x_disable_meta=HIDDEN in json.dumps(resolved_config),
            ),
        )
    except wandb.Error as error:
        raise WandbError(
            f"logger.wandb is {config.wandb!r} and wandb cannot start: {error}; "
            "logger.wandb=offline needs no server"
        ) from error
    run.define_metric("*", step_metric="step")
    return run


def _start_tensorboard(run_dir: Path, resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    folder, first = run_dir / TENSORBOARD_FOLDER, 0 if resume_step is None else resume_step + 1
    with naming_path(folder):
        return SummaryWriter(str(folder), purge_step=first)
