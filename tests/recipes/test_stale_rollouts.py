"""rollout.max_staleness: what is drawn while another step is trained is a function of configuration
and step, whoever is slow, and however often the run is killed."""

import re
import threading
import time
from concurrent.futures import wait
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tree
from run_children import in_one_process, open_run, roll_out, run_cli_in_one_process, update
from test_signals import signal_before_call

from samebit.recipes import grpo
from samebit.recipes.data.rewards import RewardError
from samebit.recipes.grpo import GrpoRecipe, LogprobMismatchError
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.draws_ahead import DrawsAhead
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.rollouts import list_rollouts, load_rollout
from samebit.recipes.run.sampling import RolloutSource
from samebit.recipes.run.signals import Stopped
from samebit.recipes.run.stale_rollouts import STATE, StaleRollouts
from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints
from samebit.trainer.megatron.trainer import MegatronTrainer

STEPS, SAMPLES = 4, 12
AHEAD = ("placement=process", "placement.transport=file", "logger.save_rollouts=true")
AHEAD += (f"trainer.num_steps={STEPS}", "trainer.background_checkpoints=false")
AHEAD += ("reward.args.control=/no",)
ONE, TWO = (*AHEAD, "rollout.max_staleness=1"), (*AHEAD, "rollout.max_staleness=2")
SPLIT = (*ONE, "trainer.batch_size=6")
EVERY_TWO = "rollout.weight_sync_steps=2"
RARE = (*TWO, "rollout.weight_sync_steps=3", "rollout.eval_every=2")
SCHEDULE = ("placement", "rollout.max_staleness", "rollout.weight_sync_steps")
MANY = (*ONE, "rollout.generate=run_children:two_turns", "rollout.max_new_tokens=8", "seed=2")
MANY += ("rollout.dynamic_sampling=true", "reward.name=run_children:score_some")
MANY += ("reward.args.every=3", "rollout.refill_prompts=4")

BESIDE = [
    ("algorithm=ppo", "critic.warmup_steps=2", "critic.optimizer.lr=1e-2"),
    ("draft.train=online", "draft.layers=[1,2]", "draft.optimizer.lr=3e-3", "ttt.passes=3")
    + ("engine.speculative=eagle3", "engine.adaptive_drafts=false", "engine.num_draft_tokens=3"),
    ("algorithm=grpo_kl", "algorithm.kl_coef=0.1", "algorithm.kl_in=reward"),
]
WAITS = (*AHEAD, "rollout.max_staleness=3", "rollout.weight_sync_steps=3", *BESIDE[0])


@pytest.fixture(autouse=True)
def one_process():
    """The engine is called from another thread all the same; one test starts its process."""
    with pytest.MonkeyPatch.context() as patch:
        in_one_process(patch.setattr)
        patch.setattr(grpo, "write_report", lambda *_, **__: None)
        yield patch


def left_in(folder):
    """What must be equal between equal runs, to the byte: rollouts, checkpoints, and the schedule
    where there is one."""
    checkpoints = list_checkpoints(folder / "run" / "checkpoints")
    files = [(c.step, c.manifest["files"], c.manifest["progress"]) for c in checkpoints]
    schedule = folder / "run" / "schedule.jsonl"
    logged = schedule.read_bytes() if schedule.exists() else b""
    return (tree(folder / "run" / "rollouts"), logged), files


def no_thread_is_left():
    return not any("samebit rollout" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("words", "drawn_after", "updates"),
    [
        (ONE, (0, 0, 1, 2), 1),
        (SPLIT, (0, 0, 1, 2), 2),
        (TWO, (0, 0, 0, 1), 1),
        (RARE, (0, 0, 0, 3), 1),
        pytest.param((*TWO, EVERY_TWO), (0, 0, 0, 2), 1, marks=pytest.mark.long),
        pytest.param((*ONE, EVERY_TWO), (0, 0, 2, 2), 1, marks=pytest.mark.long),
    ],
    ids=["one", "several optimizer steps", "two", "rare", "two of two", "one of two"],
)
def test_a_run_is_what_one_thread_would_do(
    whole, resolved, tmp_path, monkeypatch, words, drawn_after, updates
):
    """Draw, train, draw: in turns, with a colocated engine, by the schedule alone."""
    folder, (summary, rows) = whole(words)
    monkeypatch.setattr(GrpoRecipe, "_check_promise", lambda *_: None)
    alone = tuple(x for x in words if not x.startswith(SCHEDULE))
    run, drawn, versions, losses = replace(resolved(alone), output_dir=str(tmp_path)), {}, {}, []
    with open_run(run) as session, closing(GrpoRecipe(run, session)) as recipe:
        for step in range(STEPS + 1):
            if step:
                stats = update(recipe, drawn[step])
                losses.append(sum(s.loss for s in stats) / len(stats))
                recipe.progress.step += 1
            versions[step] = recipe.engine.weight_version
            for later in range(1, STEPS + 1):
                if drawn_after[later - 1] == step:
                    drawn[later] = roll_out(recipe, later - 1)
        assert recipe.trainer.digest() == summary["weights_digest"]
    assert losses == [row["train/loss"] for row in rows[1:]]
    files = list_rollouts(folder / "run")
    for step, row in enumerate(rows[1:], 1):
        drew = drawn_after[step - 1]
        assert row["rollout/staleness"] == step - 1 - drew
        assert row["rollout/weight_step"] == drew * updates
        spans = {s.version for x in load_rollout(files[step]) for s in x.version_spans}
        assert spans == {versions[drew]}
        assert row["train/logprob_tokens_compared"] > 30
        assert row["train/logprob_mismatches"] == 0
        assert (row["train/ratio"] == 1.0) is (drew == step - 1 and updates == 1)
    compared = sum(row["train/logprob_tokens_compared"] for row in rows[1:])
    assert summary["logprob_tokens_compared"] == compared


def test_what_is_timed(whole):
    """Waiting and overlap beside the phases, so that a report can show them."""
    rows = read_rows(whole(ONE)[0] / "run" / "metrics.jsonl")
    names = {f"perf/{x}_s" for x in ("rollout", "rollout_wait", "overlap", "compare", "train")}
    for row in rows[1:]:
        assert names < row.keys()
        phases = ("rollout_wait", "compare", "train", "sync", "eval")
        assert sum(row.get(f"perf/{x}_s", 0.0) for x in phases) <= row["perf/step_s"]
        assert row["perf/overlap_s"] <= row["perf/step_s"]


def test_how_long_earlier_draws_took_is_forgotten():
    """A run of many steps keeps none of it behind the step that asked for it last."""

    def draw(step, begin, poll):
        return SimpleNamespace(num_prompts=1)

    with closing(DrawsAhead(draw, RolloutSection(max_staleness=9), 10)) as draws:
        since = time.perf_counter()
        draws.begin(0, 0)
        draws.finish()
        assert 0 < draws.busy_s(since) < time.perf_counter() - since
        assert len(draws._busy) == 10
        assert draws.busy_s(time.perf_counter()) == 0
        assert not draws._busy


def slow_engine(monkeypatch):
    """A draw begins once somebody waits for it."""
    asked, changed, original_run = set(), threading.Condition(), DrawsAhead._run

    def asking(name, steps_of):
        original = getattr(DrawsAhead, name)

        def call(draws, *args):
            with changed:
                asked.update(steps_of(draws, *args))
                changed.notify_all()
            return original(draws, *args)

        monkeypatch.setattr(DrawsAhead, name, call)

    def run(draws, step, *rest):
        with changed:
            changed.wait_for(lambda: step in asked)
        return original_run(draws, step, *rest)

    asking("take", lambda draws, step, *_: [step])
    older = RolloutSection.drawn_after
    asking("waiting", lambda x, n: [s for s in x._steps if s > n > older(x._settings, s)])
    for name in ("finish", "close"):
        asking(name, lambda draws, *_: draws._steps)
    monkeypatch.setattr(DrawsAhead, "_run", run)


def slow_trainer(monkeypatch):
    """An optimizer step begins once all that may be drawn beside it is drawn."""
    made, original, found = StaleRollouts.__init__, MegatronTrainer.train_step, []

    def make(self, *args):
        made(self, *args)
        found.append(self)

    def train_step(*args):
        wait(found[-1]._draws._steps.values())
        return original(*args)

    monkeypatch.setattr(StaleRollouts, "__init__", make)
    monkeypatch.setattr(MegatronTrainer, "train_step", train_step)


@pytest.mark.parametrize(
    ("delay", "words"),
    [
        (slow_engine, SPLIT),
        pytest.param(slow_engine, ONE, marks=pytest.mark.long),
        pytest.param(slow_engine, RARE, marks=pytest.mark.long),
        pytest.param(slow_trainer, ONE, marks=pytest.mark.long),
    ],
)
def test_whoever_is_slow(train, whole, tmp_path, monkeypatch, delay, words):
    """Order and time of what happens beside each other moves no byte."""
    expected, result = whole(words)
    delay(monkeypatch)
    assert train(tmp_path, words) == result
    assert left_in(tmp_path) == left_in(expected)
    assert no_thread_is_left()


def test_an_engine_in_another_process(runs, whole, one_process):
    """As users have it, rewards too; and weights by another transport."""
    expected, (summary, rows) = whole(ONE)
    one_process.undo()
    found = runs.train("run", *ONE, "placement.transport=gloo")
    assert found[:2] == (summary, rows)
    assert left_in(runs.folder) == left_in(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(ONE, {2: [3], 4: []}), (TWO, {2: [3, 4], 4: []}), (RARE, {2: [3], 4: []})],
    ids=["one", "two", "rare"],
)
def test_what_a_checkpoint_holds(whole, words, expected):
    """All that earlier weights have drawn of later steps, and nothing else; compared, if nobody
    can compare it later."""
    found = {c.step: c.load()[STATE] for c in list_checkpoints(whole(words)[0] / "run/checkpoints")}
    assert {step: list(state) for step, state in found.items()} == expected
    assert found[2][3]["comparison"][0] > 30


# What stands in metrics.jsonl, and in rollouts/, as the run dies.
@pytest.mark.parametrize(
    ("lines", "rollouts"),
    [(4, 3), *(pytest.param(*x, marks=pytest.mark.long) for x in ((1, 1), (2, 2), (3, 2), (5, 4)))],
)
def test_killed_while_it_draws_ahead_and_resumed(
    runs, train, whole, kill_when, tmp_path, lines, rollouts
):
    """Whatever part of a later step's draw was done."""
    folder = runs.folder / "run"

    def holds():
        rows = read_rows(folder / "metrics.jsonl")
        return len(rows) >= lines and len(list_rollouts(folder)) >= rollouts

    expected, result = whole(ONE)
    kill_when(holds, ["grpo", *runs.arguments("run", *ONE)], run_cli_in_one_process)
    assert train(runs.folder, ONE, resume=True) == result
    assert left_in(runs.folder) == left_in(expected)


def assert_stopped_and_resumed(train, whole, folder, monkeypatch, fault, words, step):
    """A run that a signal stops as it is said by `fault` (class, method, number of its call) is
    saved after that step, leaves no thread and goes on to the same bytes."""
    expected, result = whole(words)
    with monkeypatch.context() as patch:
        calls = signal_before_call(patch, *fault)
        with pytest.raises(Stopped, match=f"stopped after step {step}, "):
            train(folder, words)
    assert len(calls) == fault[-1]
    assert no_thread_is_left()
    assert train(folder, words, resume=True) == result
    assert left_in(folder)[0] == left_in(expected)[0]


@pytest.mark.parametrize(
    ("name", "number", "words", "step"),
    [
        ("finish", 3, ONE, 1),
        pytest.param("take", 4, TWO, 3, marks=pytest.mark.long),
        pytest.param("compare_drawn", 3, ONE, 2, marks=pytest.mark.long),
        pytest.param("finish", 2, SPLIT, 2, marks=pytest.mark.long),
        pytest.param("take", 1, TWO, 0, marks=pytest.mark.long),
    ],
)
def test_stopped_and_resumed(train, whole, tmp_path, monkeypatch, name, number, words, step):
    """By a signal that comes while it waits for a draw, or computes beside one."""
    fault = StaleRollouts, name, number
    assert_stopped_and_resumed(train, whole, tmp_path, monkeypatch, fault, words, step)


@pytest.mark.parametrize("words", [RARE, WAITS], ids=["gone", "still served"])
def test_a_resumed_run_compares_what_was_drawn_before(train, whole, tmp_path, monkeypatch, words):
    """From a checkpoint between two updates of the engine, whose weights are gone, or are to be."""
    assert_resumed(train, whole, tmp_path, monkeypatch, words)


def test_refills_and_turns_wait_whole(train, whole, tmp_path, monkeypatch):
    """Refills are drawn in the background too, where the draw before has ended; masks and turns
    are part of a checkpoint; no sample is drawn twice."""
    expected, result = whole(MANY)
    rows = result[1][1:]
    assert any(row["rollout/refills"] for row in rows[1:])
    assert all(row["rollout/turns_mean"] == 2 for row in rows)
    files = list_rollouts(expected / "run").values()
    ids = [sample.sample_id for file in files for sample in load_rollout(file)]
    assert len(set(ids)) == len(ids) == STEPS * SAMPLES
    assert_resumed(train, whole, tmp_path, monkeypatch, MANY)


def assert_resumed(train, whole, folder, monkeypatch, words):
    """A run that dies as it has begun to draw beside step 4 goes on to the same bytes."""
    expected, result = whole(words)
    original = StaleRollouts.begin

    def dies(stale, trained, place):
        original(stale, trained, place)
        if trained == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StaleRollouts, "begin", dies)
        with pytest.raises(KeyboardInterrupt):
            train(folder, words)
    assert latest_checkpoint(folder / "run" / "checkpoints").step == 2
    assert train(folder, words, resume=True) == result
    assert left_in(folder) == left_in(expected)


@pytest.mark.long
@pytest.mark.parametrize("more", BESIDE, ids=["critic", "draft", "reference"])
def test_whatever_learns_beside_the_policy(train, whole, tmp_path, monkeypatch, more):
    """A critic, for which the policy waits two steps; a draft, which moves nothing; a KL."""
    rows = whole((*ONE, *more))[1][1]
    trained = [row for row in rows[1:] if "train/loss" in row]
    assert len(trained) == (STEPS - 2 if more is BESIDE[0] else STEPS)
    assert all(row["train/logprob_tokens_compared"] > 30 for row in trained)
    assert all(row["train/logprob_mismatches"] == 0 for row in trained)
    if more is BESIDE[1]:
        assert whole((*ONE, *more))[1][0]["weights_digest"] == whole(ONE)[1][0]["weights_digest"]
    assert_resumed(train, whole, tmp_path, monkeypatch, (*ONE, *more))


def test_an_error_in_the_background_ends_the_run(train, tmp_path, monkeypatch):
    """With its own words, in the caller's thread, and nothing goes on behind it."""
    original = RolloutSource.score

    def score(source, rollout, poll):
        if threading.current_thread() is not threading.main_thread() and rollout.problems:
            step = rollout.completions[0][0].sample_id >> 32
            if step == 2:
                raise RewardError("no such unit")
        original(source, rollout, poll)

    monkeypatch.setattr(RolloutSource, "score", score)
    with pytest.raises(RewardError, match="^no such unit$"):
        train(tmp_path, ONE)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 2
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


def test_one_wrong_bit_of_a_stale_sample_ends_the_run(train, tmp_path, monkeypatch):
    """The comparison is one, though other weights are to be trained; before they are."""
    tampered(monkeypatch, 3)
    with pytest.raises(LogprobMismatchError, match=r"^step 3: 1 of [0-9]+ log-probs differ"):
        train(tmp_path, ONE)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 2
    assert no_thread_is_left()


def test_without_the_comparison_nothing_is_compared_but_what_is_on_policy(
    train, whole, tmp_path, monkeypatch
):
    """It costs a pass and a copy of the weights, and moves none."""
    tampered(monkeypatch, 3)
    summary, rows = train(tmp_path, (*SPLIT, "rollout.check_stale=false"))
    assert summary["logprob_tokens_compared"] == rows[1]["train/logprob_tokens_compared"]
    assert not any("train/logprob_tokens_compared" in row for row in rows[2:])
    with_it = whole(SPLIT)[1][1]
    assert [r["train/loss"] for r in rows[1:3]] == [r["train/loss"] for r in with_it[1:3]]


@pytest.mark.parametrize("word", ["trainer.num_steps=7", "rollout.max_staleness=2"])
def test_a_longer_run_is_refused_and_so_is_another_staleness(whole, resolved, word):
    """What its later steps would be drawn by is gone."""
    run = replace(resolved((*ONE, word)), output_dir=str(whole(ONE)[0]), resume=True)
    with pytest.raises(CheckpointError, match=re.escape(word.partition("=")[0])):
        open_run(run)
