"""What is found out before anything of an earlier run is touched."""

import shutil

import pytest
from helpers import tree

from samebit.recipes import cli
from samebit.trainer.checkpoint import CheckpointError


def test_bad_input_removes_nothing(runs, base):
    """Not even with overwrite=true."""
    shutil.copytree(base.folder / "base", runs.folder / "kept")
    before = tree(runs.folder / "kept")
    for override in ("data.task=nope", "reward.name=nope", "model.path=/no/such/model"):
        with pytest.raises((OSError, ValueError)):
            runs.train("kept", "overwrite=true", override)
    assert tree(runs.folder / "kept") == before


def test_a_run_cannot_be_made_shorter(runs):
    """It would end at once with more steps than it was asked for."""
    runs.train("short", "trainer.num_steps=2")
    message = "written after step 2; trainer.num_steps is 1: give at least 2"
    with pytest.raises(CheckpointError, match=message):
        runs.train("short", "resume=true", "trainer.num_steps=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=/no/such/file.jsonl", "/no/such/file.jsonl"),
        ("reward.name=nope", "reward.name is 'nope'"),
        ("trainer.parallel.tensor=3", "does not divide by tensor parallel size 3"),
        ("trainer.parallel.pipeline=7", "trainer.parallel.pipeline is 7; it must divide the mod"),
    ],
)
def test_dry_run_reads_what_a_run_would(demo_model, capsys, override, message):
    """A plan of a run that cannot start is no plan."""
    base = [f"model.path={demo_model}", "device=cpu", "dry_run=true"]
    base += [] if "data" in override else ["data=reverse_digits"]
    base += ["engine.transport=stages"] if "pipeline" in override else []
    assert cli.main(["grpo", *base, override]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "properties=[]"], "properties is []; it must be at least one, or unset"),
        (["verify", "device=foo"], "device is 'foo'; it must be cpu or cuda"),
        (["diff", "a", "b", "limit=3"], "limit is 3; it must be unset without all=true"),
        (["diff", "a", "b", "c"], "'c' is no key=value"),
        (["bench", "kernels", "model=m", "tables=[]"], "tables is []; it must be at least one"),
    ],
)
def test_commands_that_would_do_nothing(capsys, arguments, message):
    assert cli.main(arguments) in (1, 2)
    assert message in capsys.readouterr().err
