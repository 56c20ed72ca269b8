"""Runs with a teacher: what it says of samples, its place in checkpoints, what is refused."""

import shutil
from contextlib import closing

import pytest
import torch
from run_children import open_run, roll_out, update

from samebit.recipes.cli.dry_run import describe_grpo
from samebit.recipes.config import ConfigError
from samebit.recipes.grpo import GrpoRecipe
from samebit.recipes.models.tiny_model import (
    make_demo_model,
    make_random_model,
    write_character_tokenizer,
)
from samebit.rollout.engine import Engine
from samebit.trainer.checkpoint import CheckpointError

DISTILLATION = (
    "algorithm=distillation",
    "trainer.batch_size=6",
    "rollout.temperature=0.7",
    "trainer.num_steps=4",
    "rollout.eval_every=2",
)


@pytest.fixture(scope="module")
def taught(make_runs, tmp_path_factory):
    """A run of four steps with a teacher of other weights."""
    runs = make_runs(tmp_path_factory.mktemp("taught"))
    make_demo_model(runs.folder / "teacher", seed=9)
    runs.taught = (*DISTILLATION, f"distillation.teacher={runs.folder / 'teacher'}")
    runs.result = runs.train("base", *runs.taught)
    return runs


def test_advantages_are_what_an_engine_of_the_teacher_says(taught):
    """To the bit, at the rollout's temperature; and the mean over all drawn tokens is logged. Every
    ratio is exactly 1 in the first of two optimizer steps, and not in the second."""
    run, seen, ratios = taught.resolve("said", *taught.taught), [], {}
    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        own = recipe.algorithm.loss

        def watched(inputs):
            seen.append(inputs.batch)
            ratios.setdefault(recipe.trainer.step, []).append(inputs.log_ratio.detach().exp())
            return own(inputs)

        recipe.algorithm.loss = watched
        rollout = roll_out(recipe, 0)
        metrics = recipe.step_metrics(update(recipe, rollout))
    assert torch.cat(ratios[0]).eq(1).all()
    assert torch.cat(ratios[1]).ne(1).float().mean() > 0.5
    pairs = zip(rollout.prompt_ids, rollout.completions, strict=True)
    drawn = [(len(prompt), [*prompt, *c.token_ids], c) for prompt, g in pairs for c in g]
    engine = Engine(taught.folder / "teacher", device="cpu")
    scores = engine.score([ids for _, ids, _ in drawn], temperature=0.7)
    expected = [
        torch.tensor(found[start - 1 :]) - torch.tensor(c.logprobs)
        for found, (start, _, c) in zip(scores, drawn, strict=True)
    ]
    assert torch.equal(torch.cat([batch.advantages for batch in seen]), torch.cat(expected))
    mean = -float(torch.cat(expected).double().mean())
    assert metrics["distillation/reverse_kl"] == pytest.approx(mean, rel=1e-6)
    summary, rows, _ = taught.result
    assert metrics["distillation/reverse_kl"] == rows[1]["distillation/reverse_kl"]
    assert summary["logprob_mismatches"] == 0


def test_the_policy_itself_teaches_nothing(runs):
    """Engine and teacher find the same bits: every advantage is exactly 0."""
    words = [*DISTILLATION, f"distillation.teacher={runs.model}"]
    run = runs.resolve("itself", *words, "distillation.engine.prefill_chunk=2")
    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        groups = recipe.teacher.with_logprobs(roll_out(recipe, 0).samples())
        for x in (s for group in groups for s in group):
            assert (x.teacher_logprobs == x.logprobs)[x.loss_mask].all()
        assert recipe.teacher.metrics == {"distillation/reverse_kl": 0.0}


def test_likeliest_tokens_are_what_an_engine_of_the_teacher_says(taught):
    """Those in the place of each token that is trained on, with several turns too; and on the first
    step the loss is the KL of the weights that drew."""
    words = [*taught.taught, "algorithm.loss_top_k=3", "rollout.generate=run_children:two_turns"]
    run, seen = taught.resolve("top", *words), []
    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        own = recipe.algorithm.loss
        recipe.algorithm.loss = lambda inputs: seen.append(inputs) or own(inputs)
        stats = update(recipe, roll_out(recipe, 0))
    assert [len(stats), stats[0].logprob_mismatches] == [2, 0]
    assert stats[0].metrics["train/ratio"] == 1.0 != stats[1].metrics["train/ratio"]
    assert stats[0].loss == pytest.approx(stats[0].metrics["train/reverse_kl"], rel=1e-6)
    samples = {s.sample_id: s for inputs in seen for s in inputs.batch.samples}
    engine = Engine(taught.folder / "teacher", device="cpu")
    scores = engine.score_top([s.token_ids.tolist() for s in samples.values()], 3, 0.7)
    for sample, (logprobs, top) in zip(samples.values(), scores, strict=True):
        assert not sample.loss_mask[1:].all()
        assert sample.teacher_logprobs[1:].tolist() == logprobs
        rows = torch.from_numpy(sample.loss_mask[1:])
        assert torch.equal(sample.teacher_top.token_ids, top.token_ids[rows])
        assert torch.equal(sample.teacher_top.rest, top.rest[rows])
    assert all(inputs.teacher_kl.min() > -1e-6 for inputs in seen)


def test_more_tokens_than_the_teacher_has_are_refused(taught):
    """At the start and in a dry run, which says what they take in the host's memory."""
    with pytest.raises(ValueError, match="algorithm.loss_top_k is 999; it must be at most [0-9]"):
        describe_grpo(taught.resolve("dry", *taught.taught, "algorithm.loss_top_k=999"))
    found = describe_grpo(taught.resolve("dry", *taught.taught, "algorithm.loss_top_k=10",
                                         "rollout.prompts_per_step=3000"))  # fmt: skip
    assert found["teacher_top_on_host_mib"] == round(3000 * 4 * 6 * 84 / 2**20, 1) > 0


def test_killed_and_resumed_to_the_same_bytes(taught, kill_when, tmp_path):
    """With the teacher's folder moved, and its engine otherwise set."""
    folder = shutil.copytree(taught.folder / "teacher", tmp_path / "teacher")
    words = [*DISTILLATION, f"distillation.teacher={folder}"]
    kill_when(taught.held(45), ["grpo", *taught.arguments("killed", *words)])
    taught.control.unlink()
    other = ["resume=true", "distillation.engine.max_num_seqs=3", "placement.release_memory=true"]
    assert taught.train("killed", *taught.taught, *other) == taught.result


def test_another_teacher_is_told_from_the_runs(taught, tmp_path):
    """By its weights, though its config.json is the same."""
    make_demo_model(tmp_path / "other", seed=10)
    words = [*DISTILLATION, f"distillation.teacher={tmp_path / 'other'}", "resume=true"]
    with pytest.raises(CheckpointError, match="the run had a teacher of digest .*; that of distil"):
        taught.train("base", *words)


def test_a_teacher_of_another_vocabulary_is_refused(runs, tmp_path):
    """At the start and in a dry run, by the first token that differs."""
    for name, characters in (("swapped", "1023456789="), ("fewer", "0123456789")):
        make_demo_model(tmp_path / name, seed=9)
        write_character_tokenizer(tmp_path / name, characters)
    make_random_model(tmp_path / "small", "qwen3", seed=1, tied=True, vocab_size=5)
    write_character_tokenizer(tmp_path / "small", "0123456789=")
    make_random_model(tmp_path / "bare", "qwen3", seed=1, tied=True)
    for name, error, message in (
        (
            "swapped",
            ValueError,
            "distillation.teacher is .*swapped'; it must be a folder whose tok",
        ),
        ("fewer", ValueError, "vocabulary: token .* of model.path is '=', which is none there"),
        ("small", ValueError, "must be a folder whose vocab_size is at least that of model.path"),
        ("bare", ValueError, "distillation.teacher .*bare holds no tokenizer"),
        ("none", FileNotFoundError, "model folder .*none does not exist"),
    ):
        words = [*DISTILLATION, f"distillation.teacher={tmp_path / name}"]
        with pytest.raises(error, match=message):
            describe_grpo(runs.resolve("other", *words))


def test_settings_that_nothing_reads_are_refused(runs):
    given = [*DISTILLATION, "distillation.teacher=t"]
    for words, message in (
        (DISTILLATION, "required: distillation.teacher=..."),
        (["distillation.teacher=t"], "unknown key: distillation.teacher"),
        ([*given, "rollout.top_k=5", "rollout.logprobs=truncated"], "rollout.logprobs is 'trunc"),
        ([*given, "distillation.engine.speculative=suffix"], "distillation.engine.speculative is"),
        (
            [*given, "distillation.engine.page_size=0"],
            "distillation.engine.page_size is 0; it must",
        ),
        ([*given, "distillation.engine.seed=3"], "distillation.engine.seed is 3; it must be 0"),
        ([*given, "distillation.engine.weights_backup=true"], "a teacher keeps its memory"),
    ):
        with pytest.raises(ConfigError, match=message):
            runs.resolve("wrong", *words)


def test_a_teacher_whose_cache_is_too_small(taught):
    """In a dry run, and not only behind the first rollout."""
    small = taught.resolve("dry", *taught.taught, "distillation.engine.kv_cache_tokens=8",
                           "distillation.engine.page_size=8")  # fmt: skip
    with pytest.raises(ValueError, match="distillation.engine.kv_cache_tokens is 8, whole pages"):
        describe_grpo(small)


def test_a_dry_run_counts_the_teacher(taught):
    found = describe_grpo(taught.resolve("dry", *taught.taught))
    assert found["teacher_mib"] == found["weights_mib"] > 0
