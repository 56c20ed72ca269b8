"""What is found out before anything of an earlier run is touched."""

import re
import shutil

import pytest
from helpers import edit_config, tree

from samebit.recipes.cli.main import main
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
    base += ["placement.transport=stages"] if "pipeline" in override else []
    assert main(["grpo", *base, override]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["grpo", "sft"])
def test_a_dry_run_says_what_ends_a_completion(demo_model, tmp_path, capsys, command):
    """And the longest sample is checked there, as before a run."""
    folder = shutil.copytree(demo_model, tmp_path / "model")
    edit_config(folder, eos_token_id=11)
    lengths = ["rollout.max_prompt_len=56", "rollout.max_new_tokens=8"]
    own = {"grpo": lengths, "sft": ["trainer.batch_size=8"]}[command]
    arguments = [f"model.path={folder}", "device=cpu", "dry_run=true", "data=reverse_digits"]
    assert main([command, *arguments, *own]) == 0
    assert "\nstop tokens: 11 (config.json), 0 (tokenizer)\n" in capsys.readouterr().out


TOO_LONG = {
    "rollout.max_new_tokens=9": "= 65 tokens; the model's context .* holds 64",
    "engine.kv_cache_tokens=63": "= 64 tokens; engine.kv_cache_tokens is 63, whole pages of 16 "
    "tokens: give at least 64",
}


@pytest.mark.parametrize("override", TOO_LONG)
@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_samples_that_no_request_may_be(demo_model, tmp_path, capsys, override, dry_run):
    """Found before anything of an earlier run is touched, not at the first full prompt."""
    arguments = ["data=reverse_digits", "rollout.max_prompt_len=56", "rollout.max_new_tokens=8"]
    arguments += ["engine.page_size=16", "logger=disabled", f"output_dir={tmp_path}", override]
    arguments += [f"model.path={demo_model}", "device=cpu", f"dry_run={dry_run}"]
    assert main(["grpo", *arguments]) == 1
    message = f"rollout.max_prompt_len . rollout.max_new_tokens {TOO_LONG[override]}"
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["grpo", "sft"])
@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_model_without_its_weights(demo_model, tmp_path, capsys, command, dry_run):
    """By the headers alone."""
    folder = shutil.copytree(demo_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    own = {
        "grpo": ["rollout.max_prompt_len=16", "rollout.max_new_tokens=8"],
        "sft": ["trainer.batch_size=8"],
    }
    arguments = [f"model.path={folder}", "device=cpu", f"dry_run={dry_run}", "data=reverse_digits"]
    out = tmp_path / "runs"
    assert main([command, *arguments, *own[command], f"output_dir={out}"]) == 1
    assert f"{folder} holds no *.safetensors file" in capsys.readouterr().err
    assert not out.exists()


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
    assert main(arguments) in (1, 2)
    assert message in capsys.readouterr().err
