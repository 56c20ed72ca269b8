"""rollout.max_staleness: what is drawn while another step is trained is a function of configuration
and step, whoever is slow, and however often the run is killed."""

import re
import threading
from concurrent.futures import wait
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from helpers import tree
from run_children import engine_here, open_run, roll_out, run_cli_with_engine_here, update
from test_signals import signal_before_call, stop_and_resume

from samebit.recipes.cli.compose import resolve
from samebit.recipes.config import ConfigError
from samebit.recipes.data.rewards import RewardError
from samebit.recipes.grpo import GrpoRecipe, LogprobMismatchError
from samebit.recipes.launch import placement
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run import draws_ahead
from samebit.recipes.run.draws_ahead import DrawsAhead
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.rollouts import list_rollouts, load_rollout
from samebit.recipes.run.sampling import RolloutSource
from samebit.recipes.run.stale_rollouts import STATE, StaleRollouts
from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints
from samebit.trainer.megatron.trainer import MegatronTrainer

STEPS, SAMPLES = 5, 12
AHEAD = ["placement=process", "placement.transport=file", "logger.save_rollouts=true"]
AHEAD += [f"trainer.num_steps={STEPS}", "trainer.background_checkpoints=false"]
ONE, TWO = [*AHEAD, "rollout.max_staleness=1"], [*AHEAD, "rollout.max_staleness=2"]
SPLIT = "trainer.batch_size=6"


@pytest.fixture(autouse=True)
def engine_in_this_process():
    """Called from another thread all the same; one test starts the process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "RemoteEngine", engine_here)
        yield patch


@pytest.fixture(scope="module")
def whole(make_runs, tmp_path_factory):
    """Uninterrupted runs, by their words; do not write to their folders."""
    known = {}

    def run(*words):
        if words not in known:
            runs = make_runs(tmp_path_factory.mktemp("whole"))
            runs.result = runs.train("run", *words)
            known[words] = runs
        return known[words]

    return run


def left_by(runs, name="run"):
    """What must be equal between equal runs, to the byte: rollouts and checkpoints."""
    checkpoints = list_checkpoints(runs.folder / name / "checkpoints")
    files = [(c.step, c.manifest["files"], c.manifest["progress"]) for c in checkpoints]
    return tree(runs.folder / name / "rollouts"), files


def no_thread_is_left():
    return not any("samebit rollout" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("words", "staleness", "updates"),
    [(ONE, 1, 1), ([*ONE, SPLIT], 1, 2), (TWO, 2, 1)],
    ids=["one", "several optimizer steps", "two"],
)
def test_a_run_is_what_one_thread_would_do(runs, whole, monkeypatch, words, staleness, updates):
    """Draw, train, draw: in turns, with a colocated engine, by the schedule alone."""
    summary, rows, _ = whole(*words).result
    monkeypatch.setattr(
        GrpoRecipe, "_check_promise", lambda *_: None
    )  # of weights that did not draw
    alone = [x for x in words if not x.startswith(("placement", "rollout.max_staleness"))]
    run, drawn, versions, losses = runs.resolve("turns", *alone), {}, {}, []
    with open_run(run) as session, closing(GrpoRecipe(run, session)) as recipe:
        for step in range(STEPS + 1):
            if step:
                stats = update(recipe, drawn[step])
                losses.append(sum(s.loss for s in stats) / len(stats))
                recipe.progress.step += 1
            versions[step] = recipe.engine.weight_version
            for later in range(1, STEPS + 1):
                if max(0, later - 1 - staleness) == step:
                    drawn[later] = roll_out(recipe, later - 1)
        assert recipe.trainer.digest() == summary["weights_digest"]
    assert losses == [row["train/loss"] for row in rows[1:]]
    files = list_rollouts(whole(*words).folder / "run")
    for step, row in enumerate(rows[1:], 1):
        drew = max(0, step - 1 - staleness)
        assert row["rollout/staleness"] == step - 1 - drew
        assert row["rollout/weight_step"] == drew * updates
        spans = {s.version for x in load_rollout(files[step]) for s in x.version_spans}
        assert spans == {versions[drew]}
        assert row["train/logprob_tokens_compared"] > 30
        assert row["train/logprob_mismatches"] == 0
        assert (row["train/ratio"] == 1.0) is (step == 1 and updates == 1)
    assert summary["logprob_tokens_compared"] == sum(
        row["train/logprob_tokens_compared"] for row in rows[1:]
    )


def test_what_is_timed(whole):
    """Waiting and overlap beside the phases, so that a report can show them."""
    rows = read_rows(whole(*ONE).folder / "run" / "metrics.jsonl")
    names = {f"perf/{x}_s" for x in ("rollout", "rollout_wait", "overlap", "compare", "train")}
    for row in rows[1:]:
        assert names < row.keys()
        phases = ("rollout_wait", "compare", "train", "sync", "eval")
        assert sum(row.get(f"perf/{x}_s", 0.0) for x in phases) <= row["perf/step_s"]
        assert row["perf/overlap_s"] <= row["perf/step_s"]


def slow_engine(monkeypatch):
    """A draw goes on only while somebody waits for it."""
    waits, original_wait, original_run = threading.Event(), draws_ahead._wait, DrawsAhead._run

    def wait_for(draws, poll):
        waits.set()
        original_wait(draws, poll)
        waits.clear()

    def run(*args):
        waits.wait()
        return original_run(*args)

    monkeypatch.setattr(draws_ahead, "_wait", wait_for)
    monkeypatch.setattr(DrawsAhead, "_run", run)


def slow_trainer(monkeypatch):
    """An optimizer step begins once all that may be drawn beside it is drawn."""
    original, found = MegatronTrainer.train_step, []
    made = StaleRollouts.__init__

    def make(self, *args):
        made(self, *args)
        found.append(self)

    def train_step(*args):
        wait(found[-1]._draws._steps.values())
        return original(*args)

    monkeypatch.setattr(StaleRollouts, "__init__", make)
    monkeypatch.setattr(MegatronTrainer, "train_step", train_step)


@pytest.mark.parametrize("delay", [slow_engine, slow_trainer])
def test_whoever_is_slow(runs, whole, monkeypatch, delay):
    """Order and time of what happens beside each other moves no byte."""
    delay(monkeypatch)
    assert runs.train("run", *ONE) == whole(*ONE).result
    assert left_by(runs) == left_by(whole(*ONE))
    assert no_thread_is_left()


def test_an_engine_in_another_process(runs, whole, engine_in_this_process):
    """As users have it; and weights by another transport."""
    expected = whole(*ONE).result
    engine_in_this_process.undo()
    assert runs.train("run", *ONE, "placement.transport=gloo") == expected
    assert left_by(runs) == left_by(whole(*ONE))


def test_what_a_checkpoint_holds(whole):
    """All that earlier weights have drawn of later steps, and nothing else."""
    for words, staleness in ((ONE, 1), (TWO, 2)):
        for checkpoint in list_checkpoints(whole(*words).folder / "run" / "checkpoints"):
            later = range(checkpoint.step + 1, min(checkpoint.step + staleness, STEPS) + 1)
            assert list(checkpoint.load()[STATE]) == list(later)


@pytest.mark.parametrize("number", [4 + 2 * SAMPLES + 3, 4 + 4 + 4 * SAMPLES - 2])
def test_killed_while_it_draws_ahead_and_resumed(runs, whole, kill_when, monkeypatch, number):
    """In a draw beside step 2, nothing being saved; in one beside a later one, from step 2 on."""
    child = whole(*ONE)
    arguments = ["grpo", *runs.arguments("run", *ONE)]
    kill_when(runs.held(number), arguments, run_cli_with_engine_here)
    runs.control.unlink()
    newest = latest_checkpoint(runs.folder / "run" / "checkpoints")
    assert (newest.step if newest else 0) == (2 if number > 40 else 0)
    assert runs.train("run", *ONE, "resume=true") == child.result
    assert left_by(runs) == left_by(child)


@pytest.mark.parametrize(
    ("name", "number", "words", "step"),
    [("finish", 3, ONE, 1), ("take", 4, TWO, 3), ("compare", 3, ONE, 2)],
)
def test_stopped_and_resumed(runs, whole, monkeypatch, capsys, name, number, words, step):
    """By a signal that comes while it waits for a draw, or computes beside one."""
    expected = whole(*words).result
    signal_before_call(monkeypatch, StaleRollouts, name, number)
    assert stop_and_resume(runs, monkeypatch, capsys, step, *words) == expected
    assert no_thread_is_left()


def test_dynamic_sampling_goes_on_where_the_draw_before_has_ended(runs, whole, monkeypatch):
    """Refills are drawn in the background too; no prompt comes twice, also after a stop."""
    words = [*ONE, "rollout.dynamic_sampling=true", "reward.name=run_children:score_some"]
    words += ["reward.args.every=3", "rollout.refill_prompts=4", "seed=2"]
    expected = whole(*words)
    rows = expected.result[1][1:]
    assert any(row["rollout/refills"] for row in rows[1:])
    files = list_rollouts(expected.folder / "run").values()
    ids = [sample.sample_id for file in files for sample in load_rollout(file)]
    assert len(set(ids)) == len(ids) == STEPS * SAMPLES
    prompts = [tuple(x.prompt_ids.tolist()) for file in files for x in load_rollout(file)[::4]]
    assert len(set(prompts)) > len(prompts) // 2
    with monkeypatch.context() as patch:
        patch.setattr(StaleRollouts, "begin", dies_after(2, StaleRollouts.begin))
        with pytest.raises(KeyboardInterrupt):
            runs.train("run", *words)
    assert runs.train("run", *words, "resume=true") == expected.result
    assert left_by(runs) == left_by(expected)


def dies_after(step, begin):
    """`begin`, which ends the run as a kill would, once the draws beside this step + 1 are on."""

    def call(stale, trained, place):
        begin(stale, trained, place)
        if trained == step + 1:
            raise KeyboardInterrupt

    return call


def test_samples_of_several_turns_wait_whole(runs, whole, monkeypatch, capsys):
    """Masks, turns and several rewards' terms are part of a checkpoint too."""
    words = [*ONE, "rollout.generate=run_children:two_turns", "rollout.max_new_tokens=8"]
    words += ["logger.num_samples=2", "trainer.num_steps=3"]
    expected = whole(*words).result
    signal_before_call(monkeypatch, StaleRollouts, "take", 3)
    found = stop_and_resume(runs, monkeypatch, capsys, 2, *words)
    assert found == expected
    assert all(row["rollout/turns_mean"] == 2 for row in found[1][1:])


def test_an_error_in_the_background_ends_the_run(runs, monkeypatch):
    """With its own words, in the caller's thread, and nothing goes on behind it."""
    runs.control.write_text(f"fail {4 + 2 * SAMPLES + 3}")
    with pytest.raises(RewardError, match="raised KeyError: 'no such unit'"):
        runs.train("run", *ONE)
    assert no_thread_is_left()


def tampered(monkeypatch, step):
    """One log-prob of a step's first sample is the neighbouring number."""
    original = RolloutSource.draw

    def draw(source, prompts, *rest):
        rollout = original(source, prompts, *rest)
        first = rollout.completions[0][0]
        if first.sample_id >> 32 == step - 1 and len(rollout.problems) == 3:
            logprob = float(np.nextafter(np.float32(first.logprobs[0]), np.float32(-9)))
            lie = (logprob, *first.logprobs[1:])
            rollout.completions[0][0] = replace(first, logprobs=lie)
        return rollout

    monkeypatch.setattr(RolloutSource, "draw", draw)


@pytest.mark.parametrize("words", [ONE, TWO], ids=["one", "two"])
def test_one_wrong_bit_of_a_stale_sample_ends_the_run(runs, monkeypatch, words):
    """The comparison is one, though the weights that are trained are others."""
    tampered(monkeypatch, 4)
    with pytest.raises(LogprobMismatchError, match=r"^step 4: 1 of [0-9]+ log-probs differ"):
        runs.train("run", *words)
    assert len(read_rows(runs.folder / "run" / "metrics.jsonl")) == (3 if words is ONE else 2)
    assert no_thread_is_left()


def test_without_the_comparison_nothing_is_compared_but_what_is_on_policy(runs, whole, monkeypatch):
    """It costs a pass and a copy of the weights; it moves no weight."""
    tampered(monkeypatch, 4)
    summary, rows, _ = runs.train("run", *ONE, "rollout.check_stale=false", SPLIT)
    assert summary["logprob_tokens_compared"] == rows[1]["train/logprob_tokens_compared"]
    assert not any("train/logprob_tokens_compared" in row for row in rows[2:])
    assert [row["train/loss"] for row in rows[1:4]] == [
        row["train/loss"] for row in whole(*ONE, SPLIT).result[1][1:4]
    ]


def test_a_longer_run_is_refused_and_so_is_another_staleness(runs, whole):
    """What its later steps would be drawn by is gone."""
    for words in (["trainer.num_steps=7"], ["rollout.max_staleness=2"]):
        key = words[0].partition("=")[0]
        run = whole(*ONE).resolve("run", *ONE, *words, "resume=true")
        with pytest.raises(CheckpointError, match=re.escape(f"{key} ")):
            open_run(run)


def test_the_schedule_is_a_function_of_the_step():
    """The weights after the step before the last one, at staleness 1."""
    settings = [RolloutSection(max_staleness=k) for k in range(3)]
    drawn = [[each.drawn_after(step) for step in range(1, 7)] for each in settings]
    assert drawn == [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4], [0, 0, 0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.max_staleness=-1"], "rollout.max_staleness is -1; it must be 0 or more"),
        (
            ["rollout.max_staleness=1"],
            "rollout.max_staleness is 1; it must be 0 with a colocated engine, which draws and "
            "trains in turns; placement=process has",
        ),
        (
            ["rollout.max_staleness=1", "placement=process", "placement.release_memory=true"],
            "placement.release_memory is True; it must be unset or false with placement.engine=pro",
        ),
        (
            ["rollout.check_stale=false"],
            "rollout.check_stale is False; it must be True, its default: nothing reads it where "
            "rollout.max_staleness is 0",
        ),
        (
            ["rollout.max_staleness=1", "placement=process", "rollout.logprobs=truncated"]
            + ["rollout.top_k=5"],
            "rollout.logprobs is 'truncated'; it must be full with rollout.max_staleness",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve("grpo", ["model.path=m", "device=cpu", *words])


def test_commands_that_train_no_policy_ahead_refuse_it():
    """eagle3's target does not change; of a plan no result says how fast it is."""
    meaning = "rollout.max_staleness is 1; it must be 0, its default: nothing reads it where"
    process = ["placement=process", "placement.transport=nccl"]
    for command, words in (("eagle3", []), ("plan", process)):
        with pytest.raises(ConfigError, match=meaning):
            resolve(command, ["model.path=m", "rollout.max_staleness=1", *words])
