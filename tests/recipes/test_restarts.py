"""Processes that are started again after a crash: to the same bytes, and not too often."""

import json
import os
import subprocess
import sys

import pytest

from samebit.recipes import grpo
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main, own_command
from samebit.recipes.config import ConfigError
from samebit.recipes.launch import launched
from samebit.recipes.run.folder import RunFolder, standing_run
from samebit.recipes.run.metrics import read_rows
from samebit.rollout.remote_ranks import RemoteEngineError
from samebit.weight_sync.disk import write_atomically

# Both ranks are up, whose starts are counted, when rank 1 does what it does.
DIES = """
[ -p meet ] || mkfifo meet 2> /dev/null
echo >> starts.$RANK
if [ "$RANK" = 0 ]; then echo > meet; else read word < meet; {how}; fi
exec cat"""


def num_starts(folder):
    return [len((folder / f"starts.{rank}").read_text()) for rank in (0, 1)]


def restarts(capsys):
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("samebit: ") for line in lines if "restart" in line]


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("kill -KILL $$", 137, "SIGKILL"), (f"exit {launched.CRASHED}", 70, "exit code 70")],
)
def test_restarts_are_bounded(launch_script, tmp_path, capsys, how, code, said):
    """All processes each time; a line for each restart, and one when there is none left."""
    assert launch_script(DIES.format(how=how), "max_restarts=2") == code
    assert num_starts(tmp_path) == [3, 3]
    assert restarts(capsys) == [
        f"rank 1 ended with {said}; restart 1 of 2, from the newest checkpoint if any",
        f"rank 1 ended with {said}; restart 2 of 2, from the newest checkpoint if any",
        f"rank 1 ended with {said} after 2 of 2 restarts; resume=true goes on",
    ]


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("exit 1", 1),
        ("exit 2", 2),
        ("kill -INT $$", 130),
        ("kill -TERM $$", 143),
        ("exit 143", 143),
    ],
)
def test_what_is_not_started_again(launch_script, tmp_path, capsys, how, code):
    """Errors that would come again, and an end that was asked for."""
    assert launch_script(DIES.format(how=how), "max_restarts=2") == code
    assert num_starts(tmp_path) == [1, 1]
    assert not restarts(capsys)


@pytest.mark.parametrize("which", ["INT", "TERM"])
def test_not_after_a_signal_to_the_launcher(launch_script, tmp_path, capsys, which):
    """Whatever becomes of the processes then."""
    how = f"kill -{which} $PPID; kill -KILL $$"
    text = f"trap '' INT TERM\n{DIES.format(how=how)}"
    assert launch_script(text, "max_restarts=2") == 137
    assert num_starts(tmp_path) == [1, 1]
    assert not restarts(capsys)


MARKED = """{"kind": "run", "command": "grpo"}"""


@pytest.mark.parametrize("stood", [False, True])
def test_a_restart_resumes_what_has_started(launch_script, tmp_path, stood):
    """Until then it is the same command: an earlier run stands in the folder, or none."""
    run = tmp_path / "run"
    run.mkdir()
    if stood:
        write_atomically(run / ".samebit", MARKED)
        write_atomically(run / "config.yaml", "earlier")
    script = f"""
[ "$RANK" = 1 ] && exit 0
echo "$*" >> commands
case $(wc -l < commands) in
1) kill -KILL $$;;
2) echo '{MARKED}' > run/.samebit; echo new > run/new; mv run/new run/config.yaml; kill -KILL $$;;
esac"""
    assert launch_script(script, "max_restarts=3") == 0
    first, second, third = (tmp_path / "commands").read_text().splitlines()
    assert second == first
    assert third == f"{first} resume=true overwrite=false"


def test_standing_runs_are_told_apart(tmp_path):
    """A run stands once it has started; one that gives up leaves the earlier one as it stood."""
    run = tmp_path / "run"

    def begin(folder, *, overwrite):
        folder.begin(resume=False, overwrite=overwrite)
        write_atomically(run / "config.yaml", "x")
        assert standing_run(run) is None

    assert standing_run(run) is None
    with RunFolder(run, "grpo") as folder:
        begin(folder, overwrite=False)
        folder.started()
    first = standing_run(run)
    with RunFolder(run, "grpo") as folder:
        assert standing_run(run) == first is not None
        begin(folder, overwrite=True)
    assert standing_run(run) == first
    with RunFolder(run, "grpo") as folder:
        begin(folder, overwrite=True)
        folder.started()
        assert standing_run(run) not in (None, first)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("no such unit"), launched.CRASHED),
        (RuntimeError("CUDA error"), launched.CRASHED),
        (RemoteEngineError("the engine's process 7 ended with code -9"), launched.CRASHED),
        (ConfigError("no"), 2),
        (ValueError("no"), 1),
        (OSError("no space left"), 1),
    ],
)
@pytest.mark.parametrize("traceback", [False, True])
def test_what_the_launcher_is_told(runs, monkeypatch, capfd, error, code, traceback):
    """An exit code says whether starting again may help, with a traceback or without."""

    def fail(*_):
        raise error

    monkeypatch.setattr(launched, "follow_launcher", lambda run: run.max_restarts > 0)
    monkeypatch.setattr(grpo, "train", fail)
    if traceback:
        monkeypatch.setenv("SAMEBIT_TRACEBACK", "1")
    monkeypatch.setenv("RANK", "0")
    assert main(["grpo", *runs.arguments("run", "max_restarts=1")]) == code
    assert str(error) in capfd.readouterr().err


def test_one_process_is_watched_only_where_it_may_be_started_again(monkeypatch):
    """And none under another launcher, which starts processes again itself."""
    monkeypatch.delenv("RANK", raising=False)
    words = ["model.path=m", "data=chain_sum"]
    once, again = (resolve("grpo", [*words, f"max_restarts={n}"]) for n in (0, 1))
    assert [launched.needs_launch(run) for run in (once, again)] == [False, True]
    assert not launched.needs_launch(resolve("grpo", [*words, "max_restarts=1", "dry_run=true"]))
    monkeypatch.setenv("RANK", "0")
    assert not launched.follow_launcher(once)
    with pytest.raises(ConfigError, match="max_restarts is 1; it must be 0 where RANK is set"):
        launched.follow_launcher(again)
    with pytest.raises(ConfigError, match="max_restarts is -1; it must be 0 or more"):
        resolve("grpo", [*words, "max_restarts=-1"])


def end_by_itself(runs, name, *words):
    """Run what dies and is started again, to its end; what its launcher says of that."""
    ended = subprocess.run(
        own_command(["grpo", *runs.arguments(name, *words)]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == result_of(runs, name)[0]
    return [line for line in ended.stderr.splitlines() if "; restart" in line]


def result_of(runs, name):
    folder = runs.folder / name
    summary = json.loads((folder / "summary.json").read_text())
    return summary, runs.rows(name), read_rows(folder / "samples.jsonl")


def starts_of(runs, name):
    lines = (runs.folder / name / "provenance.jsonl").read_text().splitlines()
    return [json.loads(line)["after_step"] for line in lines]


def dying(runs, numbers):
    """The words of a run whose rank 1, or only process, dies at these samples of its lives."""
    deaths = runs.folder / "deaths"
    deaths.write_text(numbers)
    words = ["trainer.background_checkpoints=false", "rollout.generate=run_children:dies"]
    return [*words, f"rollout.generate_args.deaths={deaths}"]


@pytest.mark.long
def test_a_killed_rank_and_the_undisturbed_digest(runs, run_ranks):
    """In step 3, behind a checkpoint: the run ends by itself, with no row twice."""
    words = ["trainer.parallel.data=2"]
    codes, said = run_ranks(runs.arguments("whole", *words, *dying(runs, "")))
    assert codes == [0, 0], said
    words += ["max_restarts=1", *dying(runs, "17")]
    assert end_by_itself(runs, "killed", *words) == [
        "samebit: rank 1 ended with SIGKILL; restart 1 of 1, from the newest checkpoint if any"
    ]
    assert starts_of(runs, "killed") == [0, 2]
    assert result_of(runs, "killed") == result_of(runs, "whole")


@pytest.mark.long
def test_a_killed_process_and_the_undisturbed_digest(runs):
    """In step 1, without a checkpoint, then in step 3; where an earlier run is replaced."""
    whole = runs.train("whole", *dying(runs, ""))
    runs.train("killed", "trainer.num_steps=2", "seed=1", *dying(runs, ""))
    words = ["max_restarts=2", "overwrite=true", *dying(runs, "7 33")]
    assert len(end_by_itself(runs, "killed", *words)) == 2
    assert starts_of(runs, "killed") == [0, 0, 2]
    assert result_of(runs, "killed") == whole
