"""Supervised runs: they learn, export what they learnt, and resume to the same bit."""

import json
import math
import shutil
import signal

import pytest
import torch
from run_children import Runs, has_begun_to_save, has_lines

from samebit.recipes import sft
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.run.inputs import SftInputs
from samebit.recipes.run.metrics import read_rows
from samebit.rollout.engine import Engine
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint
from samebit.weight_sync.transports.file import read_version


class SftRuns(Runs):
    """Twelve steps of sixteen samples, with a checkpoint every four, under one folder."""

    words = (
        "data.size=100",
        "trainer.num_steps=12",
        "trainer.batch_size=16",
        "trainer.checkpoint_every=4",
        "trainer.micro_batch_tokens=64",
        "trainer.optimizer.lr=5e-3",
    )

    def train(self, run_name, *overrides):
        summary = sft.train(resolve("sft", self.arguments(run_name, *overrides)))
        return summary, read_rows(self.folder / run_name / "metrics.jsonl")


@pytest.fixture
def runs(demo_model, tmp_path):
    return SftRuns(demo_model, tmp_path)


@pytest.fixture(scope="module")
def base(demo_model, tmp_path_factory):
    """One uninterrupted run. Do not write to its folder."""
    runs = SftRuns(demo_model, tmp_path_factory.mktemp("sft"))
    runs.result = runs.train("base")
    return runs


def test_the_loss_falls(base):
    """From chance (a vocabulary of 12) to clearly better than knowing digits only."""
    _, rows = base.result
    losses = [row["train/loss"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert 2.3 < losses[0] < 2.7
    assert losses[-1] < 1.9
    assert {"train/grad_norm", "train/learning_rate", "train/entropy"} < rows[0].keys()


def test_the_exported_model_is_the_trained_one(base):
    """The folder is a model: engine and transformers load it, with config and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary, _ = base.result
    folder = base.folder / "base" / "model"
    version = read_version(folder)
    assert (version.step, version.digest) == (12, summary["weights_digest"])
    engine = Engine(folder, device="cpu")
    assert engine.weight_version == version
    assert engine.weight_version.digest != Engine(base.model, device="cpu").weight_version.digest
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("37=73")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    assert torch.allclose(torch.tensor(engine.score([ids])[0]), expected, atol=1e-4, rtol=0)
    stored = json.loads((base.folder / "base" / "summary.json").read_text())
    assert stored == summary == {"steps": 12, "weights_digest": version.digest}


def test_held_out_records_are_measured(runs, base):
    """Their loss is that of the exported model, over the labels' tokens; training is left alone."""
    more = ["data.eval_size=6", "eval_every=5"]
    summary, rows = runs.train("held_out", *more)
    assert summary["weights_digest"] == base.result[0]["weights_digest"]
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert list(losses) == [0, 5, 10, 12]
    assert losses[12] == summary["eval_loss"] < losses[0]
    inputs = SftInputs(resolve("sft", runs.arguments("held_out", *more)))
    held_out = [inputs.eval_set.encoded(problem) for problem in inputs.eval_set]
    scores = Engine(runs.folder / "held_out" / "model", device="cpu").score(
        [[*ids.prompt_ids, *ids.label_ids] for ids in held_out]
    )
    labels = [x for s, ids in zip(scores, held_out, strict=True) for x in s[-len(ids.label_ids) :]]
    assert len(labels) == 6 * 3
    assert summary["eval_loss"] == pytest.approx(-math.fsum(labels) / len(labels), rel=1e-14)
    assert runs.train("held_out", "resume=true", *more) == (summary, rows)
    few = runs.arguments("x", "data.eval_size=1", "trainer.parallel.data=2")
    with pytest.raises(ValueError, match="1 records are held out .* trainer.parallel.data is 2"):
        SftInputs(resolve("sft", few))
    SftInputs(resolve("sft", [*few, "numerics.grad_segments=2"]))


def test_two_runs_are_the_same_run(runs, base):
    """Same configuration: same weights, same metrics."""
    assert runs.train("again") == base.result


def test_killed_and_resumed(runs, base, kill_when):
    """SIGKILL at metrics lines, while checkpoints are written, and at the export."""
    folder = runs.folder / "killed"
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"

    moments = [
        has_lines(metrics, 2),
        has_begun_to_save(checkpoints, 4),
        has_lines(metrics, 6),
        has_begun_to_save(checkpoints, 8),
        has_lines(metrics, 11),
        has_begun_to_save(checkpoints, 12),
        lambda: any(folder.glob("*model*")),
    ]
    for moment in moments:
        kill_when(moment, ["sft", *runs.arguments("killed", "resume=true")])
    assert runs.train("killed", "resume=true") == base.result
    assert read_version(folder / "model").digest == base.result[0]["weights_digest"]


def test_the_command_prints_the_summary(runs, capsys):
    """As its last line of standard output, for programs to read."""
    assert main(["sft", *runs.arguments("told", "trainer.num_steps=1")]) == 0
    stored = json.loads((runs.folder / "told" / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == stored


def test_stopped_by_a_signal_and_resumed(runs, base, monkeypatch, capsys):
    """In step 6, between its micro-batches: step 5 is saved, the exit code is 0."""
    metrics = has_lines(runs.folder / "stopped" / "metrics.jsonl", 5)

    def loss(*args):
        if metrics():
            signal.raise_signal(signal.SIGTERM)  # a second call would end the process
        return original(*args)

    original = Sft.loss
    monkeypatch.setattr(Sft, "loss", loss)
    assert main(["sft", *runs.arguments("stopped")]) == 0
    assert "samebit sft: SIGTERM: stopped after step 5, saved in" in capsys.readouterr().err
    assert latest_checkpoint(runs.folder / "stopped" / "checkpoints").step == 5
    monkeypatch.undo()
    assert runs.train("stopped", "resume=true") == base.result


def test_a_decaying_rate_is_resumed_where_it_was(runs):
    """The schedule belongs to the state; and its length to the configuration."""
    decay = ["trainer.optimizer.lr_schedule=cosine", "trainer.optimizer.lr_warmup_steps=3"]
    expected = runs.train("whole", *decay)
    rates = [row["train/learning_rate"] for row in expected[1]]
    assert rates[3] == max(rates) == 5e-3
    assert rates[-1] < 1e-3
    # Without its last checkpoint the run goes on from step 8.
    shutil.rmtree(runs.folder / "whole" / "checkpoints" / "step_00000012")
    assert runs.train("whole", "resume=true", *decay) == expected
    with pytest.raises(CheckpointError, match="another configuration"):
        runs.train("whole", "resume=true", "trainer.num_steps=20", *decay)


def test_weights_that_explode_are_not_saved(runs):
    """A run is resumed from weights that can be used, or not at all."""
    absurd = ["trainer.optimizer.lr=3.4028234e38", "trainer.checkpoint_every=1"]
    absurd += ["trainer.optimizer.adam_beta1=0", "trainer.optimizer.adam_eps=1e-30"]
    with pytest.raises(CheckpointError, match="NaN or Inf in .* after step 1; it was not saved"):
        runs.train("explode", *absurd)
    assert latest_checkpoint(runs.folder / "explode" / "checkpoints") is None


def test_samples_that_fit_no_batch_are_named(runs):
    """The error says which problem is too long."""
    with pytest.raises(ValueError, match=r"(problem|sample) \d+"):
        runs.train("long", "trainer.micro_batch_tokens=5")


def test_empty_labels_are_refused(runs, tmp_path):
    """There is nothing to learn from a problem without an answer."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "12=", "label": ""}\n{"prompt": "13=", "label": "31"}\n')
    arguments = [a for a in runs.arguments("empty") if not a.startswith("data")]
    run = resolve("sft", [*arguments, "data=file", f"data.path={data}"])
    with pytest.raises(ValueError, match="problem 0: its label is empty"):
        sft.train(run)
