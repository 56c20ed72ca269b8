"""Supervised runs recomputed from records and settings, by a plain program (plain_trainer.py)."""

import json
import shutil
from statistics import mean

import pytest
import torch
from plain_trainer import AdamW, PlainModel, optimizer_keys, order_of, rate_of, update
from safetensors.torch import load_file

from samebit.recipes import sft
from samebit.recipes.cli.compose import resolve
from samebit.recipes.models.tiny_model import make_random_model, write_character_tokenizer
from samebit.recipes.run.metrics import read_rows

LETTERS = "abcdefghijklmnopqrstuvw"
STEPS, BATCH, SEED, LONGEST = 4, 3, 5, 12
RATE = {"schedule": "linear", "warmup": 1, "highest": 3e-3, "lowest": 1e-3}
ADAMW = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1, "clip": 0.5}


def encode(text):
    return [LETTERS.index(c) + 1 for c in text]


def make_records():
    """Ten questions with answers of two to five letters; one is too long with its answer."""
    return [
        {"prompt": LETTERS[i : i + 2 + i % 4], "label": LETTERS[2 * i : 2 * i + 2 + i % 3]}
        for i in range(9)
    ] + [{"prompt": LETTERS, "label": "abc"}]


def tokens_of(record):
    """(prompt, label) as tokens, the label with its end; the prompt gives way at its left."""
    label = [*encode(record["label"]), 0]
    return encode(record["prompt"])[-(LONGEST - len(label)) :], label


class Run:
    """A run whose held-out records are the last three."""

    def __init__(self, folder, loss_mean):
        self.folder, self.dir, self.model = folder, folder / "run", folder / "start"
        self.loss_mean, self.data = loss_mean, folder / "data.jsonl"
        size = write_character_tokenizer(self.model, LETTERS)
        make_random_model(self.model, "llama", 6, tied=True, vocab_size=size, num_layers=2)
        records = make_records()
        self.training, self.held_out = records[:7], records[7:]
        self.data.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.summary = self.train()
        self.rows = read_rows(self.dir / "metrics.jsonl")

    def train(self, *more, folder=None):
        arguments = {
            "model.path": self.model,
            "output_dir": folder or self.folder,
            "device": "cpu",
            "seed": SEED,
            "logger": "disabled",
            "data.path": self.data,
            "data.eval_size": 3,
            "data.overlong_prompts": "truncate_left",
            "eval_every": 3,
            "trainer.num_steps": STEPS,
            "trainer.batch_size": BATCH,
            "trainer.loss_mean": self.loss_mean,
            "trainer.micro_batch_tokens": LONGEST,
            "trainer.checkpoint_every": 2,
            **optimizer_keys(RATE, ADAMW),
        }
        return sft.train(resolve("sft", [f"{k}={v}" for k, v in arguments.items()] + [*more]))


@pytest.fixture(scope="module", params=["token", "sequence"])
def run(request, tmp_path_factory):
    """Do not write to its folder."""
    return Run(tmp_path_factory.mktemp(request.param), request.param)


def test_every_step(run):
    """Labels alone are learnt, in the order of the seed; held-out ones are only measured."""
    model = PlainModel(run.model)
    optimizer = AdamW(model.weights, **ADAMW)

    @torch.no_grad()
    def held_out_loss():
        found = [model.read(*tokens_of(record))[0] for record in run.held_out]
        return -torch.cat(found).mean().item()

    order, losses = order_of(len(run.training), SEED, STEPS * BATCH), {0: held_out_loss()}
    assert [row["step"] for row in run.rows] == list(range(STEPS + 1))
    for step in range(STEPS):
        samples = [run.training[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        found = [model.read(*tokens_of(record)) for record in samples]
        rate = rate_of(step, STEPS, **RATE)
        nll = [(-logprobs, {"train/entropy": entropies}) for logprobs, entropies in found]
        expected = update(model, optimizer, rate, nll, run.loss_mean)
        if step + 1 in (3, STEPS):
            expected["eval/loss"] = losses[step + 1] = held_out_loss()
        row = run.rows[step + 1]
        assert row.keys() == {"step", "train/learning_rate", *expected}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        assert row["train/learning_rate"] == pytest.approx(rate, rel=1e-14)
    assert run.rows[0] == pytest.approx({"step": 0, "eval/loss": losses[0]}, rel=1e-6)
    assert run.summary["eval_loss"] == run.rows[-1]["eval/loss"]
    assert mean(row["train/grad_norm"] for row in run.rows[1:]) > 2 * ADAMW["clip"]
    weights = load_file(run.dir / "model" / "model.safetensors")
    for name, weight in model.weights.items():
        assert (weights[name] - weight).abs().max() < 2e-6, name
        moved = (weights[name] - load_file(run.model / "model.safetensors")[name]).abs().max()
        assert moved > 2e-4, name


@pytest.mark.parametrize("run", ["sequence"], indirect=True)
def test_a_resumed_run_goes_on_with_order_and_rates(run, tmp_path):
    """From the second step's checkpoint, in the middle of the schedule."""
    resumed = shutil.copytree(run.dir, tmp_path / "run")
    shutil.rmtree(resumed / "checkpoints" / "step_00000004")
    assert run.train("resume=true", folder=tmp_path) == run.summary
    assert read_rows(resumed / "metrics.jsonl") == run.rows
