"""GRPO runs recomputed from what they saved, by a plain program (plain_trainer.py)."""

import json
import shutil
from functools import cached_property
from statistics import mean, pstdev

import pytest
import torch
from helpers import tree
from plain_trainer import (
    AdamW,
    PlainModel,
    advantages_of,
    evenly,
    grpo_losses,
    optimizer_keys,
    order_of,
    rate_of,
    sample_id,
    update,
)
from run_children import score_pairs
from safetensors.torch import load_file

from samebit.recipes import grpo
from samebit.recipes.cli.compose import resolve
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.export import find_checkpoint, write_model
from samebit.recipes.models.tiny_model import make_random_model, write_character_tokenizer
from samebit.recipes.run.metrics import read_rows, without_times
from samebit.recipes.run.rollouts import load_rollout
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

LETTERS = "abcdefghijklmnopqrstuvw"
MAX_PROMPT_LEN, MAX_NEW_TOKENS, SEED = 7, 6, 11
STEPS, PROMPTS, SAMPLES = 3, 3, 4

# Each key of the configuration that the plain program reads, in two runs that differ in all.
CLIPPED = {
    "rollout": {"temperature": 0.7, "top_p": 0.9, "top_k": 12, "min_p": 0.03},
    "evaluation": {"n": 2, "temperature": 0.5, "every": 2},
    "algorithm": {"low": 0.02, "high": 0.05, "kl_coef": 0.3, "estimator": "k3"},
    "optimizer": {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1, "clip": 0.7},
    "rate": {"schedule": "linear", "warmup": 1, "highest": 3e-3, "lowest": 1e-3},
    "normalized": True,
    "loss_mean": "token",
    "batch": 6,
}
WHOLE = {
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    "evaluation": {"n": 1, "temperature": 0.0, "every": 3},
    "algorithm": {"low": 0.2, "high": 0.3, "kl_coef": 0.0, "estimator": "k3"},
    "optimizer": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.0, "clip": 0.0},
    "rate": {"schedule": "cosine", "warmup": 0, "highest": 2e-3, "lowest": 0.0},
    "normalized": False,
    "loss_mean": "sequence",
    "batch": 12,
}


def encode(text):
    return [LETTERS.index(c) + 1 for c in text]


def decode(token_ids):
    """Without <eos>, which is 0."""
    return "".join(LETTERS[i - 1] for i in token_ids if i)


def make_records():
    """Twelve questions: some longer than a prompt may be, the third one also held out."""
    questions = [
        "".join(LETTERS[(i * i + 3 * j) % 23] for j in range(2 + i % 8)) for i in range(12)
    ]
    questions[2] = questions[10]
    return [
        {"question": question, "answer": LETTERS[i : i + 3 + i % 2], "level": 1 + i / 4}
        for i, question in enumerate(questions)
    ]


class Run:
    """One run, and the records as documented: the last four are held out and never trained on."""

    def __init__(self, folder, settings):
        self.settings, self.folder, self.dir = settings, folder, folder / "run"
        self.model, self.data = folder / "start", folder / "data.jsonl"
        size = write_character_tokenizer(self.model, LETTERS)
        make_random_model(self.model, "qwen3", 4, tied=False, vocab_size=size, num_layers=2)
        records = make_records()
        self.data.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.held_out = records[8:]
        held = [record["question"] for record in self.held_out]
        self.training = [r for r in records[:8] if r["question"] not in held]
        assert len(self.training) == 7  # so the third step begins in one epoch and ends in the next
        self.summary = self.train()

    def train(self, *more, folder=None):
        s = self.settings
        algorithm = s["algorithm"]
        arguments = {
            "model.path": self.model,
            "output_dir": folder or self.folder,
            "device": "cpu",
            "seed": SEED,
            "logger": "disabled",
            "logger.save_rollouts": "true",
            "logger.num_samples": 3,
            "data.path": self.data,
            "data.prompt_key": "question",
            "data.label_key": "answer",
            "data.metadata_keys": "[level]",
            "data.eval_size": 4,
            "data.overlong_prompts": "truncate_left",
            "reward.name": "run_children:score_pairs",
            "reward.num_workers": 2,
            "rollout.prompts_per_step": PROMPTS,
            "rollout.samples_per_prompt": SAMPLES,
            "rollout.max_prompt_len": MAX_PROMPT_LEN,
            "rollout.max_new_tokens": MAX_NEW_TOKENS,
            **{f"rollout.{name}": value for name, value in s["rollout"].items()},
            "rollout.eval_samples_per_prompt": s["evaluation"]["n"],
            "rollout.eval_temperature": s["evaluation"]["temperature"],
            "rollout.eval_every": s["evaluation"]["every"],
            "algorithm.normalize_std": str(s["normalized"]).lower(),
            "algorithm.clip_ratio_low": algorithm["low"],
            "algorithm.clip_ratio_high": algorithm["high"],
            "algorithm.kl_coef": algorithm["kl_coef"],
            "algorithm.kl_estimator": algorithm["estimator"],
            "trainer.num_steps": STEPS,
            "trainer.batch_size": "null" if s["batch"] == 12 else s["batch"],
            "trainer.loss_mean": s["loss_mean"],
            "trainer.micro_batch_tokens": 40,
            "trainer.checkpoint_every": 1,
            "trainer.keep_checkpoints": 10,
            **optimizer_keys(s["rate"], s["optimizer"]),
        }
        return grpo.train(resolve("grpo", [f"{k}={v}" for k, v in arguments.items()] + [*more]))

    @cached_property
    def rows(self):
        """metrics.jsonl by step."""
        rows = read_rows(self.dir / "metrics.jsonl")
        assert [row["step"] for row in rows] == [*range(STEPS + 1)]
        return rows

    def records_of(self, step):
        """Those of a step, counted from 0, in their order."""
        order = order_of(len(self.training), SEED, PROMPTS * (step + 1))
        return [self.training[i] for i in order[PROMPTS * step :]]

    def saved(self, step):
        """What the run drew: [(prompt, tokens, log-probs, sample id, reward)], sample by sample."""
        x = load_file(self.dir / "rollouts" / f"step_{step + 1:08d}.safetensors")
        assert x["logprobs"].dtype == torch.float32
        prompts = x["prompt_ids"].split(x["prompt_lens"].tolist())
        lens = x["lens"].tolist()
        drawn = zip(x["token_ids"].split(lens), x["logprobs"].split(lens), strict=True)
        return [
            (prompts[i // SAMPLES].tolist(), tokens.tolist(), logprobs, *rest)
            for i, ((tokens, logprobs), *rest) in enumerate(
                zip(drawn, x["sample_ids"].tolist(), x["rewards"].tolist(), strict=True)
            )
        ]

    @cached_property
    def models(self):
        """Folders of the weights before each step and after the last."""
        for step in range(STEPS):
            checkpoint = find_checkpoint(self.dir / "checkpoints" / f"step_{step + 1:08d}")
            write_model(checkpoint, self.model, self.folder / f"model_{step + 1}")
        return [self.model, *(self.folder / f"model_{step + 1}" for step in range(STEPS))]

    def engine(self, step):
        """A fresh one with the weights before a step."""
        return Engine(self.models[step], device="cpu", seed=SEED, kv_cache_tokens=2048)


@pytest.fixture(scope="module", params=["clipped", "whole"])
def run(request, tmp_path_factory):
    """Do not write to its folder."""
    settings = {"clipped": CLIPPED, "whole": WHOLE}[request.param]
    return Run(tmp_path_factory.mktemp(request.param), settings)


def reward_of(text, record):
    problem = Problem(
        index=0,
        prompt=record["question"],
        label=record["answer"],
        metadata={"level": record["level"]},
    )
    return score_pairs(text, problem)


def figures(prefix, tokens, rewards):
    """What is logged of completions."""
    return {
        f"{prefix}/reward_mean": mean(rewards),
        f"{prefix}/reward_std": pstdev(rewards),
        f"{prefix}/response_len_mean": mean(map(len, tokens)),
        f"{prefix}/truncated_fraction": mean(0 not in ids for ids in tokens),
    }


def shown(step, kind, record, token_ids, logprobs, reward):
    """A row of samples.jsonl."""
    return {
        "step": step,
        "kind": kind,
        "prompt": record["question"],
        "completion": decode(token_ids),
        "label": record["answer"],
        "reward": reward,
        "finish_reason": "stop" if 0 in token_ids else "length",
        "tokens": [decode([t]) if t else "<eos>" for t in token_ids],
        "logprobs": logprobs,
    }


def assert_row(row, expected, **tolerance):
    found = {name: row[name] for name in expected}
    assert found == pytest.approx(expected, **tolerance)


def test_prompts_and_rewards_of_every_step(run):
    """Each sample is of the record whose turn it is, cut at its left, and scored by its label."""
    for step in range(STEPS):
        records = [record for record in run.records_of(step) for _ in range(SAMPLES)]
        samples = run.saved(step)
        prompts, tokens, _, ids, rewards = zip(*samples, strict=True)
        assert [*prompts] == [encode(r["question"])[-MAX_PROMPT_LEN:] for r in records]
        assert [*ids] == [sample_id(step, i, j) for i in range(PROMPTS) for j in range(SAMPLES)]
        assert [*rewards] == [reward_of(decode(t), r) for t, r in zip(tokens, records, strict=True)]
        others = [*records[SAMPLES:], *records[:SAMPLES]]
        wrong = [reward_of(decode(t), r) for t, r in zip(tokens, others, strict=True)]
        assert sum(a != b for a, b in zip(rewards, wrong, strict=True)) > 6
        assert_row(run.rows[step + 1], figures("rollout", tokens, rewards), rel=1e-13)
        read = load_rollout(run.dir / "rollouts" / f"step_{step + 1:08d}.safetensors")
        assert [
            (s.prompt_ids.tolist(), s.token_ids.tolist(), s.sample_id, s.reward) for s in read
        ] == [(prompt, ids, *rest) for prompt, ids, _, *rest in samples]


def test_rollouts_are_drawn_by_their_configuration(run):
    """An engine of its own, given the weights before each step, draws them to the bit."""
    settings = run.settings["rollout"]
    for step in range(STEPS):
        samples, engine = run.saved(step), run.engine(step)
        prompts = [prompt for prompt, *_ in samples[::SAMPLES]]
        ids = [[sample_id(step, i, j) for j in range(SAMPLES)] for i in range(PROMPTS)]

        def draw(engine=engine, prompts=prompts, ids=ids, **changed):
            params = SamplingParams(n=SAMPLES, max_new_tokens=MAX_NEW_TOKENS, **settings | changed)
            return [c for group in engine.generate(prompts, params, ids) for c in group]

        drawn = draw()
        assert [[*c.token_ids] for c in drawn] == [tokens for _, tokens, *_ in samples]
        assert [[*c.logprobs] for c in drawn] == [x.tolist() for _, _, x, *_ in samples]
        if step == 1:
            defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
            for name in (name for name in settings if settings[name] != defaults[name]):
                assert draw(**{name: defaults[name]}) != drawn, f"{name} forbids nothing"


def test_evaluations(run):
    """The held-out records, each with its label, by the weights of the step; some are kept, and of
    what was trained on before."""
    settings = run.settings["evaluation"]
    n, every, last = settings["n"], settings["every"], STEPS
    params = SamplingParams(n=n, temperature=settings["temperature"], max_new_tokens=MAX_NEW_TOKENS)
    prompts = [encode(record["question"])[-MAX_PROMPT_LEN:] for record in run.held_out]
    due = [step for step in range(last + 1) if step % every == 0 or step == last]
    assert [row["step"] for row in run.rows if "eval/reward_mean" in row] == due
    assert [row["step"] for row in run.rows if "perf/eval_s" in row] == due[1:]
    means, samples = [], []
    for step in due:
        ids = [[sample_id(step, i, j, evaluation=True) for j in range(n)] for i in range(4)]
        groups = run.engine(step).generate(prompts, params, ids)
        rewards = [
            reward_of(decode(c.token_ids), record)
            for record, group in zip(run.held_out, groups, strict=True)
            for c in group
        ]
        tokens = [c.token_ids for group in groups for c in group]
        assert_row(run.rows[step], figures("eval", tokens, rewards), rel=1e-13)
        means.append(run.rows[step]["eval/reward_mean"])
        if step > 0:
            firsts = zip(run.records_of(step - 1), run.saved(step - 1)[::SAMPLES], strict=True)
            for record, (_, ids, logprobs, _, reward) in [*firsts][:3]:
                samples.append(shown(step, "train", record, ids, logprobs.tolist(), reward))
        for i, record in enumerate(run.held_out[:3]):
            c = groups[i][0]
            samples.append(shown(step, "eval", record, c.token_ids, [*c.logprobs], rewards[i * n]))
    assert read_rows(run.dir / "samples.jsonl") == samples
    assert (run.summary["reward_first"], run.summary["reward_last"]) == (means[0], means[-1])


class PlainRun:
    """The run's training, done again from its saved samples."""

    def __init__(self, run):
        self.run, self.settings = run, run.settings
        self.model, self.reference = PlainModel(run.model), PlainModel(run.model)
        self.optimizer = AdamW(self.model.weights, **run.settings["optimizer"])
        self.num_updates = STEPS * PROMPTS * SAMPLES // run.settings["batch"]

    def losses_of(self, sample, advantage):
        prompt, tokens, drawn = sample[:3]
        temperature = self.settings["rollout"]["temperature"]
        logprobs, entropies = self.model.read(prompt, tokens, temperature)
        with torch.no_grad():
            base, _ = self.reference.read(prompt, tokens, temperature)
        algorithm = self.settings["algorithm"]
        losses, logged = grpo_losses(logprobs, drawn, base, advantage, **algorithm)
        return losses, {"train/entropy": entropies, **logged}

    def step(self, step, advantages_of=advantages_of):
        """All optimizer steps of a rollout; what the step's row is to hold."""
        samples, size, rows = self.run.saved(step), self.settings["batch"], []
        advantages = []
        for start in range(0, len(samples), SAMPLES):
            rewards = [reward for *_, reward in samples[start : start + SAMPLES]]
            advantages += advantages_of(rewards, self.settings["normalized"])
        pairs = [*zip(samples, advantages, strict=True)]
        for start in range(0, len(pairs), size):
            number = self.optimizer.count
            rate = rate_of(number, self.num_updates, **self.settings["rate"])
            losses = [self.losses_of(*pair) for pair in pairs[start : start + size]]
            loss_mean = self.settings["loss_mean"]
            rows.append(update(self.model, self.optimizer, rate, losses, loss_mean))
        return evenly(rows) | {"train/learning_rate": rate}

    def error(self, folder):
        """How far a model's weights are from these ones, at most."""
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == self.model.weights.keys()
        return max(
            (weights[name] - weight).abs().max().item()
            for name, weight in self.model.weights.items()
        )


def test_every_optimizer_step(run):
    """Advantages, ratios, losses, gradients, rates and weights, from the saved samples alone."""
    plain, clipped = PlainRun(run), []
    for step in range(STEPS):
        row = run.rows[step + 1]
        expected = plain.step(step)
        assert_row(row, expected, rel=2e-5, abs=1e-6)
        assert row["train/learning_rate"] == pytest.approx(expected["train/learning_rate"], 1e-14)
        assert plain.error(run.models[step + 1]) < 2e-6
        clipped.append(row["train/clip_fraction"])
    clips = run.settings is CLIPPED
    assert (max(clipped) > 0.01) is clips, "no ratio was clipped"
    assert all(row["train/grad_norm"] > 1 for row in run.rows[1:]), "no gradient was clipped"


def test_wrong_advantages_would_be_seen(run):
    """A group's advantages in another order move weights a hundred times further than allowed."""
    plain = PlainRun(run)
    plain.step(0, lambda *given: advantages_of(*given)[::-1])
    assert plain.error(run.models[1]) > 2e-4


def test_counts_of_every_step(run):
    """How many log-probs were compared, none of which differs, and tokens a second."""
    total = 0
    for row, samples in zip(run.rows[1:], map(run.saved, range(STEPS)), strict=True):
        compared = sum(len(tokens) for _, tokens, *_ in samples[: run.settings["batch"]])
        assert row["train/logprob_tokens_compared"] == compared
        assert row["train/logprob_mismatches"] == row["train/rollout_logprob_abs_diff_max"] == 0
        drawn, read = (sum(len(s[1]) for s in samples), sum(len(s[0] + s[1]) for s in samples))
        assert row["perf/rollout_tokens_per_s"] * row["perf/rollout_s"] == pytest.approx(drawn)
        assert row["perf/train_tokens_per_s"] * row["perf/train_s"] == pytest.approx(read)
        total += compared
    assert run.summary["logprob_tokens_compared"] == total
    assert run.summary["logprob_mismatches"] == 0


@pytest.mark.parametrize("run", ["clipped"], indirect=True)
def test_a_resumed_run_goes_on_with_order_rates_and_noise(run, tmp_path):
    """From the first step's checkpoint, in the middle of the schedule and of an epoch."""
    resumed = shutil.copytree(run.dir, tmp_path / "run")
    (resumed / "rollouts" / "step_00000009.safetensors").touch()  # of a course that is left
    for step in (2, 3):
        shutil.rmtree(resumed / "checkpoints" / f"step_{step:08d}")
    assert run.train("resume=true", folder=tmp_path) == run.summary
    assert tree(resumed / "rollouts") == tree(run.dir / "rollouts")
    assert (resumed / "samples.jsonl").read_text() == (run.dir / "samples.jsonl").read_text()
    assert without_times(read_rows(resumed / "metrics.jsonl")) == without_times(run.rows)
