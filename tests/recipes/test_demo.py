"""samebit demo, shortened: both phases, the last line, and a kill in every phase."""

import json
import os
import subprocess
import sys

import pytest
from run_children import has_lines

from samebit.recipes import cli
from samebit.recipes.metrics import read_rows
from samebit.trainer.checkpoint import latest_checkpoint


def arguments(folder, run_name):
    return [
        "demo",
        f"output_dir={folder}",
        f"run_name={run_name}",
        "device=cpu",
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


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One demo as a user starts it: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-P", "-m", "samebit.recipes.cli", *arguments(folder, "demo")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    return folder / "demo", run.stdout


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
    assert (folder / "grpo" / "report.html").stat().st_size > 10_000


def test_both_phases_ran(demo):
    """A warm start that did not reach the second phase would make the demo meaningless."""
    folder, output = demo
    assert len(read_rows(folder / "sft" / "metrics.jsonl")) == 8
    assert len(read_rows(folder / "grpo" / "metrics.jsonl")) == 7
    assert (folder / "sft" / "model" / "model.safetensors").exists()
    final = latest_checkpoint(folder / "grpo" / "checkpoints")
    assert final.step == 6
    before = json.loads((folder / "sft" / "summary.json").read_text())["weights_digest"]
    assert json.loads(output.strip().splitlines()[-1])["weights_digest"] != before


def test_killed_in_every_phase_and_resumed(demo, tmp_path, kill_when):
    """SIGKILL while the model is made, warmed up, exported, trained and reported."""
    folder, output = demo
    killed = tmp_path / "killed"

    moments = [
        (killed / "model").exists,
        has_lines(killed / "sft" / "metrics.jsonl", 2),
        lambda: (killed / "sft" / ".model.tmp").exists() or (killed / "sft" / "model").exists(),
        has_lines(killed / "grpo" / "metrics.jsonl", 1),
        has_lines(killed / "grpo" / "metrics.jsonl", 4),
        (killed / "grpo" / "summary.json").exists,
    ]
    for moment in moments:
        kill_when(moment, [*arguments(tmp_path, "killed"), "resume=true"])
    assert cli.main([*arguments(tmp_path, "killed"), "resume=true"]) == 0
    expected = json.loads(output.strip().splitlines()[-1])
    assert json.loads((killed / "summary.json").read_text()) == expected
    for phase in ("sft", "grpo"):
        rows, others = (read_rows(f / phase / "metrics.jsonl") for f in (killed, folder))
        plain = [
            [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in table]
            for table in (rows, others)
        ]
        assert plain[0] == plain[1]
