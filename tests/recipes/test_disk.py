"""A full disk or a folder that cannot be written: one line that names it, and nothing is lost."""

import pytest
from helpers import file_size_limit

from samebit.recipes import grpo
from samebit.recipes.cli.main import main
from samebit.trainer.checkpoint import latest_checkpoint


def failure(capsys, arguments):
    """The one line with which a command fails."""
    assert main(["grpo", *arguments]) == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("samebit grpo: ")]
    return line


def test_a_full_disk_costs_no_checkpoint(runs, base, capsys):
    """The half-written one is removed, the run goes on from the one before."""
    runs.train("full", "trainer.num_steps=3")
    checkpoints = runs.folder / "full" / "checkpoints"
    size = (checkpoints / "step_00000003" / "rank_00000.pt").stat().st_size
    with file_size_limit(size // 2):
        line = failure(capsys, runs.arguments("full", "resume=true"))
    assert "cannot write" in line
    assert ".step_00000004.tmp/rank_00000.pt: [Errno 27] File too large" in line
    names = ["step_00000002", "step_00000003"]
    assert sorted(p.name for p in checkpoints.iterdir()) == names
    assert latest_checkpoint(checkpoints).verify().step == 3
    assert runs.train("full", "resume=true") == base.result


def test_leftovers_of_a_kill_are_removed_at_once(runs):
    """Not only at the next checkpoint: a disk may be full because of them."""
    runs.train("left", "trainer.num_steps=1")
    checkpoints = runs.folder / "left" / "checkpoints"
    for name in (".step_00000007.tmp", ".step_00000001.old"):
        (checkpoints / name).mkdir()
    runs.train("left", "trainer.num_steps=1", "resume=true")
    assert [p.name for p in checkpoints.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("folder", ["{file}/runs", "{file}", "/proc/nowhere"])
def test_an_output_dir_that_cannot_be_written(runs, capsys, monkeypatch, folder):
    """Found before anything is loaded."""
    file = runs.folder / "file"
    file.touch()
    monkeypatch.setattr(grpo, "GrpoRecipe", None)
    folder = folder.format(file=file)
    line = failure(capsys, [*runs.arguments("run"), f"output_dir={folder}"])
    assert f"the run's folder {folder}/run cannot be written: [Errno" in line


def test_a_checkpoints_folder_that_cannot_be_written(runs, capsys, monkeypatch):
    """The same for the folder in which the first checkpoint would fail, hours later."""
    (runs.folder / "run").mkdir()
    (runs.folder / "run" / "checkpoints").touch()
    monkeypatch.setattr(grpo, "GrpoRecipe", None)
    line = failure(capsys, runs.arguments("run", "resume=true"))
    assert "run cannot be written: [Errno 17] File exists" in line


def test_a_place_that_takes_no_checkpoint_is_told_at_the_start(runs, capsys):
    """Not after hours, at the first one."""
    (runs.folder / "run").mkdir()
    (runs.folder / "run" / "checkpoints").symlink_to("/proc")  # where nobody can make a file
    line = failure(capsys, runs.arguments("run", "resume=true"))
    assert f"the run's folder {runs.folder / 'run'} cannot be written: " in line
    assert not (runs.folder / "run" / "metrics.jsonl").exists()
