"""samebit replay: a run's schedule against the one that its configuration gives.

Of schedule.jsonl every row: which prompts were begun when, which weights drew which tokens, which
prompts were trained on, and what the engine got (recipes/run/schedule_replay.py). Where the run has
kept its rollouts, samples, lengths, versions and equal rewards there have to be those of the
schedule; where it is finished, the last weights those of its summary.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from samebit.recipes.config import ConfigError
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.binding import binding_config
from samebit.recipes.run.folder import CONFIG_FILE
from samebit.recipes.run.metrics import SCHEDULE_FILE, read_rows
from samebit.recipes.run.rollouts import SavedSample, list_rollouts, load_dropped, load_rollout
from samebit.recipes.run.run_data import SUMMARY_FILE
from samebit.recipes.run.schedule import ScheduleRow
from samebit.recipes.run.schedule_replay import ScheduleError, ScheduleReplay
from samebit.recipes.tools_config import ReplayRun
from samebit.weight_sync.types import VersionSpan


def open_schedule(path: Path) -> tuple[ScheduleReplay, list[ScheduleRow], int]:
    """Read a run's folder: what replays its schedule, the rows, and the steps of the whole run.

    Raises ConfigError for what is no such folder, and ValueError for a damaged file.
    """
    if not (path / SCHEDULE_FILE).is_file():
        raise ConfigError(
            f"{path} holds no {SCHEDULE_FILE}: runs of grpo with rollout.max_staleness or "
            "rollout.partial_tokens have one"
        )
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path / CONFIG_FILE))
        settings, trainer = RolloutSection(**config["rollout"]), config["trainer"]
        samples = settings.prompts_per_step * settings.samples_per_prompt
        num_waits = config.get("critic", {}).get("warmup_steps", 0)
        if settings.dynamic_sampling and "max_refills" not in binding_config(config)["rollout"]:
            settings.max_refills = sys.maxsize  # a resume may have changed it
        replay = ScheduleReplay(settings, trainer["batch_size"] or samples, num_waits)
        num_steps = trainer["num_steps"]
    except (YAMLError, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path / CONFIG_FILE} is no configuration of a grpo run") from error
    rows = list(_read_schedule(path / SCHEDULE_FILE))
    if not rows:
        raise ConfigError(f"{path / SCHEDULE_FILE} holds no step yet")
    return replay, rows, num_steps


def _read_schedule(file: Path) -> Iterator[ScheduleRow]:
    """The rows of a file; each is a line, for read_rows refuses what is none."""
    for line, row in enumerate(read_rows(file), 1):
        try:
            yield ScheduleRow.of_plain(row)
        except ValueError as error:
            raise ValueError(f"{file}, line {line} is damaged: {error}") from error


class SavedRollouts:
    """Compares the rollouts that a run has kept with its schedule; steps are given in turn."""

    def __init__(self, path: Path) -> None:
        self._files = list_rollouts(path)
        self._spans: dict[int, list[VersionSpan]] = {}
        """By sample: from which token on which version drew. Who goes on with what others drew has
        computed it anew."""
        self._lens: dict[int, int] = {}
        self.num_steps = 0
        """So many have been compared."""

    def check(self, row: ScheduleRow) -> None:
        """Raises ScheduleError for the first sample that was drawn otherwise than the row says."""
        for group in row.drawn:
            for i, (start, end) in enumerate(group.tokens, group.first_id):
                spans = self._spans.setdefault(i, [])
                if end > start and (not spans or spans[-1].version != row.version):
                    spans.append(VersionSpan(start, row.version, recomputed=bool(spans)))
                self._lens[i] = end
        if row.step in self._files:
            self.num_steps += 1
            samples = load_rollout(self._files[row.step])
            self._check_prompts(row, [sample.sample_id for sample in samples])
            for sample in samples:
                self._check_sample(row.step, sample)

    def _check_prompts(self, row: ScheduleRow, sample_ids: list[int]) -> None:
        """Whether the step was trained on these, and has dropped those of equal rewards."""
        size = len(row.drawn[0].tokens)
        wanted = [first_id + i for first_id in row.trained for i in range(size)]
        if sample_ids != wanted:
            raise ScheduleError(
                f"step {row.step}: the saved rollout has the samples {_ids(sample_ids)}; the "
                f"schedule says {_ids(wanted)}"
            )
        dropped = list(load_dropped(self._files[row.step]).items())
        groups = [dropped[i : i + size] for i in range(0, len(dropped), size)]
        equal = [group[0][0] for group in groups if len({reward for _, reward in group}) == 1]
        if equal != [*row.equal]:
            raise ScheduleError(
                f"step {row.step}: equal rewards in the saved rollout have {_ids(equal)}; the "
                f"schedule says {_ids(row.equal)}"
            )

    def _check_sample(self, step: int, sample: SavedSample) -> None:
        known = self._lens.get(sample.sample_id), self._spans.get(sample.sample_id)
        spans = [*sample.version_spans]
        if (len(sample.token_ids), spans) != known:
            raise ScheduleError(
                f"step {step}: sample {sample.sample_id:#x} of the saved rollout has "
                f"{len(sample.token_ids)} tokens, drawn by {_told(spans)}; the schedule says "
                f"{known[0]}, {_told(known[1] or [])}"
            )


def _ids(ids: Iterable[int]) -> str:
    return ", ".join(map(hex, ids)) or "none"


def _told(spans: list[VersionSpan]) -> str:
    return ", ".join(
        f"{span.version.step} ({span.version.digest}) from {span.start}"
        + (", which computed the context anew" if span.recomputed else "")
        for span in spans
    )


def _check_end(summary: Path, rows: list[ScheduleRow], num_steps: int) -> None:
    """Of a run that is finished: whether all steps are there, and what it has come to."""
    if not summary.exists():
        return
    if len(rows) != num_steps:
        raise ScheduleError(f"it ends after step {len(rows)} of {num_steps}")
    served, found = rows[-1].served, json.loads(summary.read_bytes())["weights_digest"]
    if served is not None and served.digest != found:
        raise ScheduleError(
            f"step {num_steps}: served's digest is {served.digest}; {summary.name} says {found}"
        )


def main(run: ReplayRun) -> int:
    """Run the command `samebit replay`; 1 where the schedule differs, 2 for what has none."""
    path = Path(run.run)
    try:
        replay, rows, num_steps = open_schedule(path)
        rollouts = SavedRollouts(path)
        try:
            for row in rows:
                replay.check(row)
                rollouts.check(row)
            _check_end(path / SUMMARY_FILE, rows, num_steps)
        except ScheduleError as error:
            print(f"first difference: {error}")
            return 1
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    kept = f"; rollouts of {rollouts.num_steps} steps are as it says" if rollouts.num_steps else ""
    print(f"the schedule of {len(rows)} steps is what the configuration gives{kept}")
    return 0
