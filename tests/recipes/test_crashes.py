"""The machine dies at any instant of a run's writing: every reader finds the old or the new, whole,
and nothing that was reported is lost."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from crashing_disk import CrashingDisk
from safetensors.torch import load_file, save_file

from samebit.recipes.cli.main import main
from samebit.recipes.run.folder import RunFolder, entries
from samebit.recipes.run.metrics import (
    METRICS_FILE,
    SAMPLES_FILE,
    SCHEDULE_FILE,
    LoggerConfig,
    MetricsLogger,
    read_rows,
)
from samebit.recipes.run.provenance import record_start
from samebit.recipes.run.report import write_report
from samebit.recipes.run.rollouts import (
    drop_rollouts_after,
    list_rollouts,
    load_rollout,
    save_rollout,
)
from samebit.recipes.run.signals import StopSignals
from samebit.rollout.types import Completion
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.weight_sync.disk import write_atomically
from samebit.weight_sync.folders import MARKER, read_marker
from samebit.weight_sync.transports.file import read_version
from samebit.weight_sync.types import VersionSpan, WeightVersion


@pytest.fixture
def disk(tmp_path):
    return CrashingDisk(tmp_path / "disk")


@pytest.fixture
def crashes(disk, tmp_path, monkeypatch):
    """Of what was recorded, one after another."""

    def each(*kinds):
        monkeypatch.setattr(os, "fsync", lambda _: None)  # what reads them need not wait
        return disk.crashes(tmp_path / "after", *kinds)

    return each


@pytest.mark.parametrize("mode", [0o666, 0o600])
def test_a_file_that_is_replaced(disk, crashes, mode):
    """config.yaml, summary.json and all other small files."""
    with disk.recording():
        for number, text in enumerate(("first", "the second")):
            write_atomically(disk.folder / "file", text, mode)
            disk.report(number)
    seen = set()
    for crash in crashes():
        file = crash.folder / "file"
        found = file.read_text() if file.exists() else None
        texts = [None, "first", "the second"]
        assert found in texts[len(crash.reported) : len(crash.reported) + 2], crash.what
        seen.add(found)
    assert seen == {None, "first", "the second"}


def log(logger, disk, *steps):
    for step in steps:
        logger.log(step, {"x": step / 7})
        logger.log_samples(step, "eval", [{"completion": f"{step}"}])
        logger.log_schedule({"step": step})
    logger.sync()
    disk.report(steps[-1])


def test_metrics_and_samples(disk, crashes):
    """Whole rows in order, at least those that were synced; a resumed run cuts back to its step, is
    killed in turn, and loses none of the rows before it."""
    run, config = disk.folder / "runs" / "run", LoggerConfig(wandb="disabled")
    with disk.recording():
        with MetricsLogger(run, config, "r", {}, None, True) as logger:
            log(logger, disk, 0, 1)
            log(logger, disk, 2)
        with MetricsLogger(run, config, "r", {}, 1, True) as logger:
            disk.report("cut")
            log(logger, disk, 2, 3)
    bounds = [(0, 2), (2, 3), (2, 3), (2, 4), (4, 4)]  # after 2 the cut may have begun
    for crash in crashes():
        least, most = bounds[len(crash.reported)]
        for name in (METRICS_FILE, SAMPLES_FILE, SCHEDULE_FILE):
            rows = read_rows(crash.folder / "runs" / "run" / name)
            assert [row["step"] for row in rows] == list(range(len(rows))), crash.what
            assert least <= len(rows) <= most, crash.what
            assert all(row.get("x", row["step"] / 7) == row["step"] / 7 for row in rows)
    assert len(crash.reported) == len(bounds) - 1


def test_a_report(disk, crashes):
    """The page, and the lines of provenance."""
    disk.folder.mkdir()
    (disk.folder / METRICS_FILE).write_text("".join(f'{{"step": {i}, "x": 1}}\n' for i in range(3)))
    pages = [None]
    with disk.recording():
        for number in range(2):
            record_start(disk.folder, torch.device("cpu"), number)
            page = write_report(disk.folder, title=f"{number}", summary={}, config_yaml="")
            disk.report(number)
            pages.append(page.read_text())
    for crash in crashes():
        lines = crash.folder / "provenance.jsonl"
        found = lines.read_text().splitlines(keepends=True) if lines.exists() else []
        assert [json.loads(line)["after_step"] for line in found] == list(range(len(found)))
        assert all(line.endswith("}\n") for line in found), crash.what
        assert len(found) >= len(crash.reported), crash.what
        page = crash.folder / "report.html"
        text = page.read_text() if page.exists() else None
        assert text in pages[len(crash.reported) : len(crash.reported) + 2], crash.what


def completion(token):
    return Completion(
        request_id=0,
        sample_id=token,
        token_ids=(token, 2),
        logprobs=(-0.5, -1.5),
        finish_reason="stop",
        version_spans=(),
    )


def rollouts_in(folder):
    """The first token of every step's only sample."""
    files = list_rollouts(folder)
    return {step: int(load_rollout(file)[0].token_ids[0]) for step, file in files.items()}


def test_rollouts(disk, crashes):
    """Whole files; those of a course that was left behind do not come back once that is done."""
    run = disk.folder / "run"
    with disk.recording():
        for step, token in ((1, 11), (2, 12)):
            save_rollout(run, step, [[5]], [[completion(token)]], [[1.0]])
            disk.report((step, token))
        drop_rollouts_after(run, 1)
        disk.report("dropped")
        save_rollout(run, 2, [[5]], [[completion(22)]], [[1.0]])
        disk.report((2, 22))
    courses = [{}, {1: 11}, {1: 11, 2: 12}, {1: 11}, {1: 11, 2: 22}]
    for crash in crashes():
        at = len(crash.reported)
        assert rollouts_in(crash.folder / "run") in courses[at : at + 2], crash.what
    assert rollouts_in(run) == courses[-1]


def test_a_rollout_comes_back_to_the_bit(tmp_path):
    """Every sample with its group's prompt, its own tokens, log-probs and weight versions, and its
    exact reward; of a file of earlier versions without them."""
    prompts, lens = [[5, 6, 7], [8]], [1, 3, 2, 4]
    drawn = [
        replace(
            completion(n),
            token_ids=tuple(range(n)),
            logprobs=tuple(-k / 7 for k in range(n)),
            version_spans=tuple(
                VersionSpan(k, WeightVersion(k, "00" * 8), k == 2) for k in range(n)
            ),
        )
        for n in lens
    ]
    save_rollout(tmp_path, 3, prompts, [drawn[:2], drawn[2:]], [[0.1, 1e300], [1 / 3, -0.0]])
    [found] = [load_rollout(file) for file in list_rollouts(tmp_path).values()]
    assert [sample.prompt_ids.tolist() for sample in found] == [prompts[i // 2] for i in range(4)]
    assert [sample.token_ids.tolist() for sample in found] == [list(c.token_ids) for c in drawn]
    assert [sample.sample_id for sample in found] == lens
    assert [str(sample.reward) for sample in found] == ["0.1", "1e+300", str(1 / 3), "-0.0"]
    for sample, one in zip(found, drawn, strict=True):
        assert torch.equal(sample.logprobs, torch.tensor(one.logprobs))
        assert sample.version_spans == one.version_spans
    [file] = list_rollouts(tmp_path).values()
    tensors = load_file(file)
    del tensors["version_spans"]
    save_file(tensors, file)
    assert [sample.version_spans for sample in load_rollout(file)] == [()] * 4


# -- a run that takes an earlier one's place ---------------------------------------------------

OLD = {"config.yaml": "old", "checkpoints/step_00000002/manifest.json": "{}", "notes": "mine"}
NEW = {"config.yaml": "new", "metrics.jsonl": "new"}


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in files
        if not path.name.startswith(".samebit")
    }


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_folder(disk, crashes, fails):
    """The next process finds the earlier run until the new one stands, and then that."""
    run = disk.folder / "run"
    with RunFolder(run, "sft") as folder:
        folder.begin(resume=False, overwrite=False)
        folder.started()
        for name, text in OLD.items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text(text)
    with disk.recording(), RunFolder(run, "grpo") as folder:
        folder.begin(resume=False, overwrite=True)
        for name, text in NEW.items():
            write_atomically(run / name, text)
        if not fails:
            folder.started()
            disk.report("started")
    seen = []
    for crash in crashes():
        RunFolder(crash.folder / "run", "grpo").close()
        found = contents(crash.folder / "run")
        stands = found == NEW
        assert stands or found == OLD, crash.what
        assert stands >= bool(crash.reported), crash.what
        marker = {"kind": "run", "command": "grpo" if stands else "sft", "format": 1}
        assert read_marker(crash.folder / "run") == marker, crash.what
        assert {path.name for path in (crash.folder / "run").glob(".*")} <= {
            MARKER,
            f"{MARKER}.tmp",
        }
        seen.append(stands)
    assert seen[0] is False
    assert (True in seen) != fails


def test_a_new_runs_folder(disk, crashes):
    """Its marker is there once it has begun: else it would be in nobody's hands."""
    run = disk.folder / "outputs" / "run"
    with disk.recording():
        folder = RunFolder(run, "grpo")
        folder.begin(resume=False, overwrite=False)
        folder.started()
        disk.report("started")
        folder.close()
    for crash in crashes():
        found = crash.folder / "outputs" / "run"
        marker = read_marker(found)
        assert marker is not None or not crash.reported, crash.what
        if found.exists():
            assert marker is not None or entries(found) == [], crash.what
            RunFolder(found, "grpo").close()
            assert read_marker(found) in (None, {"kind": "run", "command": "grpo", "format": 1})
            assert entries(found) == [], crash.what


# -- whole runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["grpo", "sft"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_checkpoint_does_not_outlive_its_rows(runs, disk, crashes, monkeypatch, command, stopped):
    """Or the resumed run would never write them; also the one that a signal asks for. Whatever was
    not synced has no bytes here."""
    monkeypatch.setattr(StopSignals, "poll_together", signalled(3 if stopped else 99))
    arguments = [
        argument
        for argument in runs.arguments("run", f"output_dir={disk.folder}", "data.eval_size=1")
        if command == "grpo" or not argument.startswith(("reward.", "rollout."))
    ]
    every = 9 if stopped else 1
    arguments += ["trainer.num_steps=2", f"trainer.checkpoint_every={every}"]
    if command == "sft":
        arguments += ["trainer.batch_size=2", "data.eval_size=0"]
    if stopped:
        arguments.append("trainer.num_steps=5")
    with disk.recording():
        assert main([command, *arguments]) == 0
        disk.report("done")
    steps = set()
    for crash in crashes(["lost"]):
        run = crash.folder / "run"
        newest = latest_checkpoint(run / "checkpoints")
        step = newest.verify().step if newest else 0
        found = {row["step"] for row in read_rows(run / METRICS_FILE)}
        assert found >= set(range(1, step + 1)), crash.what
        assert newest is None or "run_name" in (run / "config.yaml").read_text(), crash.what
        steps.add(step)
        if crash.reported:
            assert step == 2, crash.what
            assert stopped or json.loads((run / "summary.json").read_text()), crash.what
            assert stopped or command == "grpo" or read_version(run / "model").step == 2
    assert steps == ({0, 2} if stopped else {0, 1, 2})


def signalled(number):
    """poll_together, whose call of this number gets a signal first."""
    original, calls = StopSignals.poll_together, []

    def poll(stop):
        calls.append(stop)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        original(stop)

    return poll
