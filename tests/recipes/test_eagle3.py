"""Draft training on a target's own answers: it learns, is written, and resumes to the bit."""

import json
import shutil
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from helpers import assert_same_bits, tree
from run_children import Runs

from samebit.kernels.logprob import logprob_of
from samebit.recipes import eagle3
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.recipes.data.order import SampleIds, problem_index
from samebit.recipes.export import find_checkpoint
from samebit.recipes.launch.draft import engine_of, make_draft_trainer
from samebit.recipes.models.tiny_model import make_demo_model, write_weights
from samebit.recipes.run.answers import AnswerSource
from samebit.recipes.run.inputs import Eagle3Inputs
from samebit.recipes.run.metrics import read_rows, without_times
from samebit.rollout.engine import Engine
from samebit.rollout.runtime.draft_folder import open_draft
from samebit.rollout.types import SamplingParams
from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint


class Eagle3Runs(Runs):
    """Six steps of eight answers, with a checkpoint every two, under one folder."""

    words = (
        "data.size=50",
        "data.eval_size=3",
        "draft.layers=[1,2]",
        "draft.vocab_size=9",
        "draft.vocab_prompts=8",
        "draft.feeds_normed=true",
        "ttt.passes=3",
        "ttt.eval_passes=4",
        "rollout.prompts_per_step=8",
        "rollout.max_prompt_len=8",
        "rollout.max_new_tokens=20",
        "rollout.eval_every=3",
        "rollout.eval_samples_per_prompt=8",
        "trainer.num_steps=6",
        "trainer.checkpoint_every=2",
        "trainer.micro_batch_tokens=64",
        "trainer.optimizer.lr=2e-3",
    )

    def resolve(self, run_name, *overrides):
        return resolve("eagle3", self.arguments(run_name, *overrides))

    def train(self, run_name, *overrides):
        summary = eagle3.train(self.resolve(run_name, *overrides))
        return summary, read_rows(self.folder / run_name / "metrics.jsonl")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The demo's model with weights large enough to have something to say. Do not write to it."""
    path = tmp_path_factory.mktemp("models") / "target"
    make_demo_model(path, seed=3)
    write_weights(path, seed=3, std=0.1)
    return path


@pytest.fixture
def runs(target, tmp_path):
    return Eagle3Runs(target, tmp_path)


@pytest.fixture(scope="module")
def base(target, tmp_path_factory):
    """One uninterrupted run. Do not write to its folder."""
    runs = Eagle3Runs(target, tmp_path_factory.mktemp("eagle3"))
    summary, rows = runs.train("base")
    return runs, summary, rows


def test_a_draft_is_learned_and_written(base):
    """Its folder is what the last checkpoint holds, and a run can start from it."""
    runs, summary, rows = base
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[6]["eval/loss"] < rows[0]["eval/loss"] - 0.3
    assert rows[6]["eval/acceptance_0"] > rows[0]["eval/acceptance_0"] + 0.05
    assert all(1 <= row["eval/accept_length"] <= 5 for row in (rows[0], rows[3], rows[6]))
    assert summary["accept_length_first"] == rows[0]["eval/accept_length"]
    for name in eagle3.SUMMED_UP:
        assert summary[name] == rows[6][f"eval/{name}"]
    took = sum(row["perf/step_s"] for row in rows[1:])
    assert took < summary["perf/wall_s"] == sum(row["perf/wall_s"] for row in rows)
    found = open_draft(runs.folder / "base" / "draft", num_target_layers=2)
    assert (found.config.captured_layers, found.config.draft_vocab_size) == ((1, 2), 9)
    assert found.config.feeds_normed
    state = latest_checkpoint(runs.folder / "base" / "checkpoints").load()
    params = {name: torch.empty_like(p) for name, p in state["params"].items()}
    found.fill(params)
    for name, param in state["params"].items():
        assert_same_bits(params[name], param, name)
    drop = ("draft.layers=null", "draft.vocab_size=null", "draft.vocab_prompts=256")
    start = (f"draft.path={found.path}", "draft.feeds_normed=false", "draft.dialect=speculators")
    more, again = runs.train("more", *drop, *start, "trainer.num_steps=1")
    for key in ("eval/accept_length", "eval/greedy_accept_length"):  # of the same answers
        assert again[0][key] == rows[6][key]
    with pytest.raises(ConfigError, match="is a draft's, of samebit eagle3, which writes its own"):
        find_checkpoint(runs.folder / "base")
    assert open_draft(runs.folder / "more" / "draft").dialect == "speculators"
    assert more["steps"] == 1


def test_a_resumed_run_ends_in_the_same_bytes(base, runs):
    """From the checkpoint after step 4, in a copy of the run's folder."""
    original, summary, rows = base
    shutil.copytree(original.folder / "base", runs.folder / "base")
    shutil.rmtree(runs.folder / "base" / "checkpoints" / "step_00000006")
    again, resumed = runs.train("base", "resume=true")
    assert without_times([again]) == without_times([summary])
    assert without_times(resumed) == without_times(rows)
    folders = [where.folder / "base" / "draft" for where in (original, runs)]
    assert tree(folders[0]) == tree(folders[1])
    manifests = [
        latest_checkpoint(where.folder / "base" / "checkpoints").manifest
        for where in (original, runs)
    ]
    assert manifests[0] == manifests[1]


def guessed(runs, target, each=False, **guesses):
    """(accept lengths, tokens per step) of an engine that draws the held-out answers and guesses
    four tokens at a time; it does not count steps in which nothing is guessed, of a token each.

    each: a prompt behind another, each by an engine of its own.
    """
    run = runs.resolve("engine")
    inputs = Eagle3Inputs(run)
    guesses |= {"num_draft_tokens": 4, "adaptive_drafts": False}
    config = replace(run.engine, max_model_len=28, **guesses)
    splits, samples, lengths = (inputs.train_set, inputs.eval_set), [], []
    for part in [slice(i, i + 1) for i in range(len(inputs.eval_set))] if each else [slice(None)]:
        with closing(Engine(target, config, device="cpu")) as engine:
            source = AnswerSource(run.rollout, run.seed, splits, engine, inputs.config)
            prompts = source.held_out_prompts(0)
            own = {name: getattr(prompts, name)[part] for name in ("token_ids", "sample_ids")}
            samples += source.draw(replace(prompts, **own))
            lengths.append(engine.accept_lengths)
    found = sum(lengths[1:], lengths[0])
    tokens = sum(sample.num_trained - 1 for sample in samples)
    return found, tokens / (found.verifications + tokens - found.tokens)


def test_accept_lengths_are_those_of_an_engine(base, target):
    """Which draws the same held-out answers with the draft that the run ends with, by one guess
    more than it was trained for."""
    runs, _, rows = base
    folder = str(runs.folder / "base" / "draft")
    found, per_step = guessed(runs, target, speculative="eagle3", draft_model=folder)
    assert found.verifications > 50
    assert 0 < found.num_right < found.num_guessed
    assert found.right[3] > 0
    assert per_step == rows[6]["eval/accept_length"] < found.accept_length


def test_suffix_is_measured_on_the_same_answers(base, target):
    """As in an engine that guesses by it, siblings' texts included."""
    runs, _, rows = base
    found, per_step = guessed(runs, target, each=True, speculative="suffix")
    assert 0 < found.num_right < found.num_guessed
    assert found.verifications > 10
    assert 1 < per_step < found.accept_length
    assert all(rows[i]["eval/suffix_accept_length"] == per_step for i in (0, 3, 6))


def test_held_out_prompts_are_answered_once(parts):
    """The target does not move; a second evaluation asks it for nothing."""
    engine, source, *_ = parts
    first = source.held_out(4)
    drawn = engine.step_loop.num_drawn
    assert source.held_out(4) is first
    assert engine.step_loop.num_drawn == drawn
    answers, greedy = first
    assert (answers.temperature, greedy.temperature) == (1.0, 0.0)
    assert (len(answers.samples), len(greedy.samples)) == (24, 3)
    assert min(answers.suffix_accept_length, greedy.suffix_accept_length) > 1


@pytest.mark.long
def test_a_block_draft_is_trained_and_guesses(runs, target):
    """Its folder, in the speculators dialect, serves an engine that draws what others draw."""
    words = "draft.mask_token_id=11", "draft.dialect=speculators", "draft.feeds_normed=false"
    _, rows = runs.train("block", *words, "rollout.eval_every=6")
    trained = [row["train/loss"] for row in rows if "train/loss" in row]
    assert trained[-1] < trained[0]
    draft = f"block_draft_model={runs.folder / 'block' / 'draft'}"
    bench = ["device=cpu", "batches=[3]", "input_len=9", "output_len=12", "repeats=1"]
    bench += ["proposers=[peagle]", "adaptive_drafts=false", draft, f"output_dir={runs.folder}"]
    assert main(["bench", "speculative", f"model={target}", *bench]) == 0
    report = json.loads((runs.folder / "bench_speculative" / "bench.json").read_text())
    assert len(report["batches"]["3"]["peagle"]["acceptance"]) == 5


def test_another_target_is_refused(base, runs, tmp_path):
    """The same folder with other weights; and another setting, by name."""
    original, _, _ = base
    shutil.copytree(original.folder / "base", runs.folder / "base")
    with pytest.raises(CheckpointError, match="configuration: ttt.loss_decay 0.8 there, 0.5 here"):
        runs.train("base", "resume=true", "ttt.loss_decay=0.5")
    shutil.copytree(original.model, tmp_path / "other")
    write_weights(tmp_path / "other", seed=99)
    runs.model = tmp_path / "other"
    with pytest.raises(CheckpointError, match="was trained on a target of digest"):
        runs.train("base", "resume=true")


@pytest.fixture(scope="module")
def parts(target, tmp_path_factory):
    """(engine, source, trainer, prompts, a step's samples) of a run that has not begun."""
    run = Eagle3Runs(target, tmp_path_factory.mktemp("parts")).resolve("parts")
    inputs, engine = Eagle3Inputs(run), engine_of(run, torch.device("cpu"))
    splits = inputs.train_set, inputs.eval_set
    source = AnswerSource(run.rollout, run.seed, splits, engine, inputs.config)
    vocabulary = source.vocabulary(9, 8, lambda: None)
    trainer = make_draft_trainer(run, None, inputs.config, vocabulary, engine)
    prompts = source.training_prompts(0)
    return engine, source, trainer, prompts, source.draw(prompts)


def test_streams_have_the_bits_of_drawing(parts):
    """Those of a prefill, packed, are those that the engine had when it drew."""
    engine, source, _, prompts, samples = parts
    drawn = engine.generate(
        prompts.token_ids, prompts.params, prompts.sample_ids, return_hidden_states=[1, 2]
    )
    seen, [data, *rest] = 0, list(source.batches(samples, 64))
    assert rest, "one micro-batch would test little"
    for part in (data, *rest):
        for layer in (1, 2):
            for i, own in enumerate(part.streams[layer].split(part.batch.seq_lens)):
                [completion] = drawn[seen + i]
                assert_same_bits(own[:-1], completion.hidden_states[layer])
        seen += len(part.batch.samples)
    assert seen == len(samples) == 8


def test_the_targets_head_gives_its_own_logprobs(parts):
    """So the last stream is taken before the final norm, and normed once: as the engine scores."""
    engine, source, trainer, _, samples = parts
    for data in source.batches(samples, 64):
        ids, lens = data.batch.input_ids.split(data.batch.seq_lens), data.batch.seq_lens
        scores = engine.score([x.tolist() for x in ids])
        for own, x, expected in zip(data.streams[2].split(lens), ids, scores, strict=True):
            logits = trainer._target.logits(own[:-1])
            assert logprob_of(logits, x[1:]).tolist() == expected


def test_the_vocabulary_is_what_the_target_says(parts):
    """The nine most frequent of twelve tokens; the output layer begins as the target's rows."""
    engine, source, trainer, _, _ = parts
    ids = SampleIds().of_step((1 << 31) - 1, 8, 1)
    indices = [problem_index(i, 50, 0) for i in range(8)]
    prompts = [source._train_set.encoded(source._train_set[i]).prompt_ids.tolist() for i in indices]
    drawn = engine.generate(prompts, SamplingParams(max_new_tokens=20), ids)
    said = [token for [c] in drawn for token in c.token_ids]
    counts = sorted(range(12), key=lambda token: (-said.count(token), token))
    assert trainer.vocabulary.token_ids.tolist() == sorted(counts[:9])
    rows = engine.weights["embedding.word_embeddings.weight"][trainer.vocabulary.token_ids]
    assert_same_bits(trainer.params["draft.output_layer.weight"][:9].detach(), rows)


def test_a_dry_run_reads_and_writes_nothing(runs, capsys):
    assert main(["eagle3", *runs.arguments("dry"), "dry_run=true"]) == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    said = {line[0]: line[1] for line in lines if len(line) == 2}
    assert said["draft_vocabulary"] == "9"
    assert said["captured_layers"] == "1, 2"
    assert said["optimizer_steps"] == "6"
    assert said["most_tokens_per_step"] == "224"
    assert not (runs.folder / "dry").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["draft.layers=null"], "draft.layers: a target of 2 layers has no default"),
        (["draft.layers=[1,3]"], r"captured_layers is \[1, 3\]; the target has streams after 0"),
        (["draft.layers=[0,1]"], r"it has no embeddings \(0\)"),
        (
            ["draft.mask_token_id=12", "draft.dialect=speculators", "draft.feeds_normed=false"],
            "draft.mask_token_id is 12; the target has 12 tokens",
        ),
        (
            [
                "draft.mask_token_id=3",
                "draft.dialect=speculators",
                "draft.feeds_normed=false",
                "ttt.passes=1",
            ],
            "ttt.passes is 1; it must be at least 2 for a block draft",
        ),
        (["draft.vocab_size=13"], "draft.vocab_size is 13; the target has 12 tokens"),
        (
            ["draft.vocab_size=12"],
            "draft.vocab_prompts is 8; .* nothing reads it where the draft says all of the target'",
        ),
        (["rollout.max_new_tokens=60", "trainer.micro_batch_tokens=80"], "the model's context"),
    ],
)
def test_what_cannot_be_is_refused_before_it_begins(runs, overrides, message):
    """By the run and by dry_run, after reading the model's folder."""
    with pytest.raises(ValueError, match=message):
        runs.train("refused", *overrides)
    assert not (runs.folder / "refused").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["draft.path=x"], "draft.vocab_size is 9; it must be None, its default: nothing reads"),
        (["draft.dialect=vllm"], "draft.dialect is 'vllm'; it must be one of"),
        (["draft.norm_before_residual=true"], "it must be false with draft.dialect=sglang"),
        (["draft.mask_token_id=3"], "draft.mask_token_id is 3; it must be unset with draft.dialec"),
        (
            ["draft.mask_token_id=3", "draft.dialect=speculators"],  # its words have it
            "draft.feeds_normed is True; it must be false with draft.mask_token_id",
        ),
        (["draft.norm_output=sglang"], "nothing reads it where draft.path is unset"),
        (["draft.verifier=x"], "nothing reads it where draft.dialect is 'sglang'"),
        (
            ["draft.fc_norm=true", "draft.norm_before_fc=true"],
            "false with draft.norm_before_fc=true",
        ),
        (["trainer.batch_size=4"], "trainer.batch_size is 4; it must be None, its default"),
        (["trainer.parallel.data=2"], "the command is eagle3, which runs in one process"),
        (["numerics.grad_segments=2"], "numerics.grad_segments is 2; it must be 0, its default"),
        (["trainer.micro_batch_tokens=27"], "it must be at least 28, the longest sample"),
        (["data.eval_size=0"], "data.eval_size is 0; it must be at least 1"),
        (["rollout.dynamic_sampling=true", "rollout.samples_per_prompt=2"], "scores no answer"),
        (["rollout.max_new_tokens=1"], "rollout.max_new_tokens is 1; it must be at least 2"),
        (["trainer.loss_mean_tokens=5"], "trainer.loss_mean_tokens is 5"),
        (["engine.seed=5"], "engine.seed is 5"),
        (["ttt.passes=0"], "ttt.passes is 0; it must be positive"),
        (["ttt.eval_passes=0"], "ttt.eval_passes is 0; it must be positive"),
    ],
)
def test_wrong_settings_are_refused(runs, overrides, message):
    with pytest.raises(ConfigError, match=message):
        runs.resolve("wrong", *overrides)


def test_a_draft_of_another_target_is_refused(base, runs, tmp_path):
    """By its folder's sizes."""
    original, _, _ = base
    shutil.copytree(original.folder / "base" / "draft", tmp_path / "draft")
    file = tmp_path / "draft" / "config.json"
    keys = json.loads(file.read_text())
    drop = ("draft.layers=null", "draft.vocab_size=null", "draft.vocab_prompts=256")
    start = (*drop, "draft.feeds_normed=false", f"draft.path={tmp_path / 'draft'}")
    file.write_text(json.dumps(keys | {"max_position_embeddings": 16}))
    with pytest.raises(ValueError, match="= 28 tokens; the draft's max_position_embeddings is 16"):
        runs.train("other", *start)


def test_a_draft_folder_that_was_edited_is_refused(base, runs, tmp_path):
    """A resumed run has the weights of its checkpoint: they would be another draft's."""
    original, _, _ = base
    shutil.copytree(original.folder / "base" / "draft", tmp_path / "draft")
    drop = ("draft.layers=null", "draft.vocab_size=null", "draft.vocab_prompts=256")
    start = (*drop, "draft.feeds_normed=false", f"draft.path={tmp_path / 'draft'}")
    runs.train("started", *start, "trainer.num_steps=1", "trainer.checkpoint_every=1")
    file = tmp_path / "draft" / "config.json"
    keys = json.loads(file.read_text())
    rope = keys["rope_parameters"] | {"rope_theta": 5e4}
    file.write_text(json.dumps(keys | {"rope_theta": 5e4, "rope_parameters": rope}))
    with pytest.raises(CheckpointError, match="draft.path/config.json"):
        runs.train("started", *start, "trainer.num_steps=2", "resume=true")
