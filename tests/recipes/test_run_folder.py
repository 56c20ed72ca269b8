"""A run's folder: nothing is removed before the new run stands, and nothing that no run made."""

import json
import multiprocessing
import shutil
from contextlib import suppress

import pytest
import torch
from helpers import edit_tensors, run_python, tree
from run_children import open_run

from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.recipes.run.folder import RunFolder, require_own_report
from samebit.trainer.checkpoint import CheckpointError
from samebit.weight_sync.folders import FolderInUseError, FolderLock, read_marker

FILES = {"config.yaml": "old", "checkpoints/step_00000002/manifest.json": "{}", "notes.txt": "mine"}


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def contents(folder):
    """Every file but our own, as text."""
    return {str(p): x.decode() for p, x in tree(folder).items() if p.name[:8] != ".samebit"}


@pytest.fixture
def earlier(tmp_path):
    """The folder of a run of sft, with a file that the user put there."""
    path = tmp_path / "run"
    with RunFolder(path, "sft") as folder:
        folder.begin(resume=False, overwrite=False)
        folder.started()
        write_files(path, FILES)
    return path


def replace(path, fail=False):
    with RunFolder(path, "grpo") as folder:
        folder.begin(resume=False, overwrite=True)
        write_files(path, {"config.yaml": "new", "metrics.jsonl": "new"})
        assert contents(path).items() > {"config.yaml": "new"}.items()
        if fail:
            raise ValueError("it cannot start")
        folder.started()


def test_the_earlier_run_gives_way_once_the_new_one_stands(earlier, capsys):
    replace(earlier)
    assert contents(earlier) == {"config.yaml": "new", "metrics.jsonl": "new"}
    assert read_marker(earlier) == {"kind": "run", "command": "grpo", "format": 1}
    assert "run holds a run of `samebit sft`, which overwrite=true removes once" in (
        capsys.readouterr().err
    )


def test_or_it_is_put_back(earlier):
    before = tree(earlier)
    with pytest.raises(ValueError, match="it cannot start"):
        replace(earlier, fail=True)
    assert tree(earlier) == before


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    """So that the next try needs no overwrite=true."""
    with pytest.raises(ValueError, match="it cannot start"):
        replace(tmp_path / "fresh", fail=True)
    assert list(tmp_path.iterdir()) == []


def close_and_tell(folder, connection):
    folder.close()
    connection.send("closed")


def test_a_forked_child_puts_nothing_back(earlier):
    """A reward may fork, and its child unwind the run's stack: the run goes on."""
    with RunFolder(earlier, "grpo") as folder:
        folder.begin(resume=False, overwrite=True)
        write_files(earlier, {"config.yaml": "new"})
        before = tree(earlier)
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        child = context.Process(target=close_and_tell, args=(folder, there))
        child.start()
        assert here.recv() == "closed"
        child.join()
        assert tree(earlier) == before
        with pytest.raises(FolderInUseError):
            FolderLock(earlier)
        folder.started()
    assert contents(earlier) == {"config.yaml": "new"}


def test_siblings_stay(earlier):
    """Whatever their names."""
    for name in (".run.old", ".run.tmp", ".run.samebit-x", "run.old"):
        write_files(earlier.parent / name, {"precious": "x"})
    others = {p: x for p, x in tree(earlier.parent).items() if p.parts[0] != "run"}
    replace(earlier)
    assert {p: x for p, x in tree(earlier.parent).items() if p.parts[0] != "run"} == others


@pytest.mark.parametrize("resume", [False, True])
def test_a_foreign_folder_with_a_config_is_kept(tmp_path, resume):
    """config.yaml is a name that many programs use."""
    write_files(tmp_path / "run", {"config.yaml": "x", "thesis.tex": "y"})
    message = (
        "config.yaml exists, but .* no .samebit" if resume else "holds no .samebit of a run: no"
    )
    with RunFolder(tmp_path / "run", "grpo") as folder, pytest.raises(OSError, match=message):
        folder.begin(resume=resume, overwrite=True)
    assert contents(tmp_path) == {"run/config.yaml": "x", "run/thesis.tex": "y"}


@pytest.mark.parametrize("fail", [False, True])
def test_what_was_there_before_the_first_run_stays(tmp_path, fail):
    """resume=true may begin beside a user's files, such as a scheduler's logs; overwrite=true then
    removes the run alone, and a start that fails touches neither."""
    path = tmp_path / "run"
    mine = {"job.out": "mine", "logs/1.out": "mine too"}
    write_files(path, mine)
    with RunFolder(path, "grpo") as folder:
        folder.begin(resume=True, overwrite=False)
        write_files(path, FILES)
        folder.started()
    for _ in range(2):
        with suppress(ValueError):
            replace(path, fail)
        runs = FILES if fail else {"config.yaml": "new", "metrics.jsonl": "new"}
        assert contents(path) == mine | runs


def test_another_commands_run_is_not_gone_on_with(earlier):
    message = "holds a run of `samebit sft`, so `samebit grpo` cannot go on there; give another"
    with RunFolder(earlier, "grpo") as folder, pytest.raises(FileExistsError, match=message):
        folder.begin(resume=True, overwrite=False)


def test_links(tmp_path, earlier):
    """A folder behind a link is that folder; a link to nowhere is named."""
    (tmp_path / "link").symlink_to(earlier)
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(earlier) == {"config.yaml": "new", "metrics.jsonl": "new"}
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="lost cannot be written: it is a link to .*nowhere, which"):
        RunFolder(tmp_path / "lost", "grpo")


def test_two_processes_in_one_folder(runs, base, capsys):
    """For new runs, resumed and overwritten ones, and the demo alike; nothing is changed."""
    path = runs.folder / "run"
    for command in ("grpo", "demo"):
        with RunFolder(path, command) as folder:
            folder.begin(resume=False, overwrite=False)
            before = tree(path)
            arguments = runs.arguments("run") if command == "grpo" else ["device=cpu"]
            arguments += [f"output_dir={runs.folder}", "run_name=run"]
            for how in ([], ["resume=true"], ["overwrite=true"]):
                assert main([command, *arguments, *how]) == 1
                line = capsys.readouterr().err.splitlines()[-1]
                assert line.startswith(f"samebit {command}: {path} is in use by process ")
            assert tree(path) == before


HOLD = """
import sys
from pathlib import Path
from samebit.recipes.run.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]), "grpo")
try:
    folder.begin(resume=False, overwrite=True)
finally:
    import os; os._exit(0)
"""


def test_a_killed_process_leaves_no_lock(earlier):
    """And what it had moved comes back, also for a run that is resumed."""
    before = contents(earlier)
    run_python(HOLD, earlier)
    assert not (earlier / "notes.txt").exists()
    with RunFolder(earlier, "sft") as folder:
        folder.begin(resume=True, overwrite=False)
        assert contents(earlier) == before


# -- whole runs --------------------------------------------------------------------------------


@pytest.fixture
def kept(runs, base):
    """A copy of a finished run, to be overwritten in vain."""
    return shutil.copytree(base.folder / "base", runs.folder / "kept")


def break_norm(tensors):
    tensors["model.norm.weight"][0] = float("nan")


def test_a_run_that_cannot_start_costs_nothing(runs, kept, tmp_path, monkeypatch):
    """NaN weights, no weights, lengths over the context, a logger that fails: it is all there."""
    before = tree(kept)
    broken = shutil.copytree(runs.model, tmp_path / "broken")
    edit_tensors(broken, break_norm)
    empty = shutil.copytree(runs.model, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    long = ["rollout.max_new_tokens=100", "trainer.micro_batch_tokens=200"]
    for overrides in ([f"model.path={broken}"], [f"model.path={empty}"], long):
        with pytest.raises((OSError, ValueError)):
            runs.train("kept", "overwrite=true", *overrides)
        assert tree(kept) == before

    def fail(*_args):
        raise RuntimeError("wandb says no")

    monkeypatch.setattr("samebit.recipes.run.metrics._start_wandb", fail)
    with pytest.raises(RuntimeError, match="wandb says no"):
        runs.train("kept", "overwrite=true", "logger.wandb=offline")
    assert tree(kept) == before


def test_what_a_run_reads_is_not_removed(runs, kept, capsys):
    """The model, data or a file of the reward inside the folder, also behind links, or behind a
    link that is inside itself."""
    model = shutil.copytree(runs.model, kept / "model")
    (runs.folder / "linked").symlink_to(model)
    partly = shutil.copytree(runs.model, runs.folder / "partly")
    (partly / "model.safetensors").unlink()
    (partly / "model.safetensors").symlink_to(model / "model.safetensors")
    (kept / "data.jsonl").write_text('{"prompt": "1", "label": "1"}\n' * 9)
    (runs.folder / "data.jsonl").write_text('{"prompt": "2", "label": "2"}\n' * 9)
    (runs.folder / "many").mkdir()
    (runs.folder / "many" / "train-0.jsonl").symlink_to(kept / "data.jsonl")
    (kept / "control").touch()
    (kept / "outside").symlink_to(runs.model)
    before = tree(kept)
    task = ["data.task=file", "data.args={}", "data.size=100000"]
    inside, outside = (f"path={folder / 'data.jsonl'}" for folder in (kept, runs.folder))
    for key, *overrides in (
        ("model.path", f"model.path={model}"),
        ("model.path", f"model.path={runs.folder / 'linked'}"),
        ("model.path", f"model.path={partly}", "dry_run=true"),
        ("model.path", f"model.path={kept / 'outside'}", "dry_run=true"),
        ("reward.args.control", f"reward.args.control={kept / 'control'}", "dry_run=true"),
        ("data.path", *task, f"data.{inside}", "dry_run=true"),
        ("data.path", *task, f"data.path={runs.folder / 'many'}", "dry_run=true"),
        ("data.path", *task, f"data.path={runs.folder / 'many'}/train-*", "dry_run=true"),
        ("data.eval_path", *task, f"data.{outside}", f"data.eval_{inside}", "dry_run=true"),
    ):
        generated = ("data.args", "data.size") if key.startswith("data") else ()
        arguments = [a for a in runs.arguments("kept") if not a.startswith(generated)]
        assert main(["grpo", *arguments, "overwrite=true", *overrides]) == 2
        error = capsys.readouterr().err
        assert f"{key} is to be read from" in error
        assert ".samebit," not in error
        assert f"which lies in {kept}, which overwrite=true removes" in error
    assert tree(kept) == before


def test_a_model_in_a_parent_folder_is_not_inside(runs, tmp_path):
    """outputs/ in the model's own folder is where many runs are."""
    model = shutil.copytree(runs.model, tmp_path / "model")
    arguments = [f"model.path={model}", f"output_dir={model}/outputs", "overwrite=true"]
    for _ in range(2):
        with open_run(runs.resolve("run", *arguments)) as session:
            session.started()
    assert (model / "model.safetensors").exists()


def test_sft_does_not_replace_what_it_starts_from(runs, capsys):
    """Its export goes to run_dir/model, at its end."""
    model = runs.folder / "run" / "model"
    shutil.copytree(runs.model, model)
    arguments = [f"model.path={model}", f"output_dir={runs.folder}", "run_name=run", "device=cpu"]
    arguments += ["data=reverse_digits", "trainer.batch_size=2", "resume=true", "logger=disabled"]
    assert main(["sft", *arguments]) == 2
    assert "which the run's export replaces" in capsys.readouterr().err
    arguments[0] = f"model.path={runs.model}"
    assert main(["sft", *arguments]) == 1
    assert "run/model holds no .samebit of an export" in capsys.readouterr().err


def test_reports_do_not_land_in_a_runs_folder(earlier, capsys):
    """verify and bench share run_name and output_dir with runs; a file of others is kept too."""
    where = [f"output_dir={earlier.parent}", "run_name=run", "device=cpu"]
    for command in (["verify"], ["bench", "engine", "model=m"], ["bench", "trainer", "model=m"]):
        assert main([*command, *where]) == 2
        assert f"{earlier} is the folder of a run; give another run_name" in capsys.readouterr().err
    write_files(earlier.parent, {"other/verify.json": '{"theirs": 1}'})
    with pytest.raises(ConfigError, match=r"verify.json is there and no report of ours"):
        require_own_report(earlier.parent / "other" / "verify.json")
    report = earlier.parent / "ours" / "verify.json"
    write_files(earlier.parent, {"ours/verify.json": json.dumps({"command": "samebit verify"})})
    require_own_report(report)


def test_nan_weights_are_not_saved(runs):
    """Or they would push the last good checkpoint out."""
    with open_run(runs.resolve("run")) as session:
        state = {"step": 4, "params": {"a": torch.tensor([1.0, torch.nan])}}
        with pytest.raises(CheckpointError, match="NaN or Inf in a after step 4; it was not saved"):
            session.save(4, state, {})
        assert list(session.checkpoints.iterdir()) == []


def test_the_lock_is_held_for_the_whole_run(runs):
    """From the opening to the end of the session."""
    with open_run(runs.resolve("run")), pytest.raises(FolderInUseError):
        FolderLock(runs.folder / "run")
