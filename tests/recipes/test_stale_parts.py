"""rollout.max_staleness together with rollout.partial_tokens: steps are drawn ahead, in stints; by
which weights which tokens are is a function of configuration, step and lengths."""

from contextlib import closing
from dataclasses import replace

import pytest
from run_children import has_lines, in_one_process, open_run, run_cli_in_one_process, update
from test_partial_rollouts import DYNAMIC, PARTIAL, SOME, WORDS, bits, saved, tell_a_lie
from test_replay import replayed
from test_stale_rollouts import (
    BESIDE,
    assert_stopped_and_resumed,
    left_in,
    no_thread_is_left,
    slow_engine,
    slow_trainer,
)

from samebit.recipes import grpo
from samebit.recipes.grpo import GrpoRecipe, LogprobMismatchError
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.stale_parts import LEFT, StaleParts
from samebit.recipes.run.stale_rollouts import STATE
from samebit.recipes.run.stints import Stints
from samebit.trainer.checkpoint import list_checkpoints

STEPS = 4
PROCESS = ("placement=process", "placement.transport=file")
ONE = (*PARTIAL, *PROCESS, "rollout.max_staleness=1")
TWO = (*PARTIAL, *PROCESS, "rollout.max_staleness=2")
EVERY_TWO = (*ONE, "rollout.weight_sync_steps=2")
RARE = (*TWO, "rollout.weight_sync_steps=3", "rollout.eval_every=2")
SPLIT = (*ONE, "trainer.batch_size=3")
DROPS = (*WORDS, *SOME, *DYNAMIC, *PROCESS, "rollout.max_staleness=1")
APART = ("placement", "rollout.max_staleness", "rollout.weight_sync_steps", "rollout.partial")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Rewards and engines run in this process; draws are another thread's all the same."""
    in_one_process(monkeypatch.setattr)
    monkeypatch.setattr(grpo, "write_report", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("words", "drawn_after"),
    [
        (ONE, (0, 0, 1, 2)),
        (EVERY_TWO, (0, 0, 2, 2)),
        pytest.param(SPLIT, (0, 0, 1, 2), marks=pytest.mark.long),
        pytest.param(TWO, (0, 0, 0, 1), marks=pytest.mark.long),
        pytest.param(RARE, (0, 0, 0, 3), marks=pytest.mark.long),
    ],
    ids=["one", "two of two", "several optimizer steps", "two", "rare"],
)
def test_a_run_is_what_one_thread_would_do(
    whole, resolved, tmp_path, monkeypatch, capsys, words, drawn_after
):
    """Draw in stints, train, draw: in turns, with a colocated engine, by the schedule alone; and
    every token that was drawn is compared once."""
    folder, (summary, rows) = whole(words)
    monkeypatch.setattr(GrpoRecipe, "_check_promise", lambda *_: None)
    alone = tuple(x for x in words if not x.startswith(APART))
    run, settings = replace(resolved(alone), output_dir=str(tmp_path)), resolved(words).rollout
    drawn, left, begin, losses = {}, [], 0, []
    with open_run(run) as session, closing(GrpoRecipe(run, session)) as recipe:
        stints = Stints(settings, recipe.rollout_source)
        for step in range(STEPS + 1):
            if step:
                stats = update(recipe, drawn[step].trained)
                losses.append(sum(s.loss for s in stats) / len(stats))
                recipe.progress.step += 1
            for later in range(1, STEPS + 1):
                if drawn_after[later - 1] == step:
                    drawn[later] = stints.draw(later - 1, begin, left, (int, int))
                    left, begin = drawn[later].left, begin + drawn[later].num_prompts
        assert recipe.trainer.digest() == summary["weights_digest"]
    assert losses == [row["train/loss"] for row in rows[1:]]
    for samples, row, after, step in zip(
        saved(folder), rows[1:], drawn_after, drawn.values(), strict=True
    ):
        found = [(c.sample_id, c.token_ids, c.version_spans) for c in flat(step)]
        assert [(x.sample_id, (*x.token_ids.tolist(),), x.version_spans) for x in samples] == found
        assert row["rollout/staleness"] == row["step"] - 1 - after
        assert row["rollout/weight_step"] == step.version.step
        assert {k: row[k] for k in step.metrics()} == step.metrics()
    assert max(len(x.version_spans) for step in saved(folder) for x in step) > 1
    tokens = sum(step.num_tokens for step in drawn.values())
    size = resolved(words).batch_size  # on-policy alone the first optimizer step compares
    tokens -= sum(len(c.token_ids) for c in flat(drawn[1])[size:])
    assert summary["logprob_tokens_compared"] == tokens
    assert summary["logprob_mismatches"] == 0
    assert replayed(folder / "run", capsys)[0] == 0


def flat(step):
    return [c for group in step.trained.completions for c in group]


@pytest.mark.long
def test_at_learning_rate_0_samples_are_those_drawn_in_one_go(whole):
    """To the bit; and what is trained on when is what partial rollouts alone would train on."""
    still = "trainer.optimizer.lr=0"
    found, alone = (saved(whole((*words, still))[0]) for words in (ONE, PARTIAL))
    for step, other in zip(found, alone, strict=True):
        assert [x.sample_id for x in step] == [x.sample_id for x in other]
        assert [bits(x) for x in step] == [bits(x) for x in other]


@pytest.mark.long  # by default of whole samples, which the same thread draws
@pytest.mark.parametrize("delay", [slow_engine, slow_trainer])
def test_whoever_is_slow(train, whole, tmp_path, monkeypatch, delay):
    """Order and time of what happens beside each other moves no byte."""
    expected, result = whole(ONE)
    delay(monkeypatch)
    assert train(tmp_path, ONE) == result
    assert left_in(tmp_path) == left_in(expected)
    assert no_thread_is_left()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (ONE, {2: [3], 4: []}),
        (EVERY_TWO, {2: [], 4: []}),
        *(pytest.param(TWO, {2: [3, 4], 4: []}, marks=pytest.mark.long),),
    ],
    ids=["one", "two of two", "two"],
)
def test_what_a_checkpoint_holds(whole, words, expected):
    """What earlier weights have drawn of later steps, with what that leaves; or what the last step
    has left, where nothing waits."""
    for checkpoint in list_checkpoints(whole(words)[0] / "run" / "checkpoints"):
        state = checkpoint.load()
        assert list(state[STATE]) == expected[checkpoint.step]
        for waiting in state[STATE].values():
            assert waiting["comparison"][0] > 10
            assert len(waiting["left"]["places"]) > 0
        assert bool(state[LEFT]["places"]) is not bool(state[STATE])


def assert_resumed(train, whole, folder, monkeypatch, words):
    """A run that dies as it has begun to draw beside step 4 goes on to the same bytes."""
    expected, result = whole(words)
    original = StaleParts.begin

    def dies(stale, trained, place):
        original(stale, trained, place)
        if trained == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StaleParts, "begin", dies)
        with pytest.raises(KeyboardInterrupt):
            train(folder, words)
    assert train(folder, words, resume=True) == result
    assert left_in(folder) == left_in(expected)


@pytest.mark.parametrize(
    "words",
    [
        ONE,
        pytest.param(EVERY_TWO, marks=pytest.mark.long),
        pytest.param(DROPS, marks=pytest.mark.long),
        pytest.param(TWO, marks=pytest.mark.long),
        pytest.param(RARE, marks=pytest.mark.long),
    ],
    ids=["one", "two of two", "dropped", "two", "rare"],
)
def test_dead_and_resumed(train, whole, tmp_path, monkeypatch, words):
    """From what the checkpoint has of parts and of whole steps; the log is the same, too."""
    assert_resumed(train, whole, tmp_path, monkeypatch, words)


@pytest.mark.parametrize(
    ("name", "number", "words", "step"),
    [
        ("compare_taken", 3, EVERY_TWO, 2),  # what was taken is dropped, and nothing waits
        pytest.param("take", 4, TWO, 3, marks=pytest.mark.long),
        pytest.param("finish", 2, ONE, 1, marks=pytest.mark.long),
    ],
)
def test_stopped_and_resumed(train, whole, tmp_path, monkeypatch, name, number, words, step):
    """By a signal, in the middle of a step."""
    fault = StaleParts, name, number
    assert_stopped_and_resumed(train, whole, tmp_path, monkeypatch, fault, words, step)


@pytest.mark.long
@pytest.mark.parametrize("lines", [1, 2, 3, 4])
def test_killed_and_resumed(runs, train, whole, kill_when, lines):
    """By SIGKILL, whatever part of a later step was drawn."""
    expected, result = whole(ONE)
    condition = has_lines(runs.folder / "run" / "metrics.jsonl", lines)
    kill_when(condition, ["grpo", *runs.arguments("run", *ONE)], run_cli_in_one_process)
    assert train(runs.folder, ONE, resume=True) == result
    assert left_in(runs.folder) == left_in(expected)


@pytest.mark.parametrize(
    ("step", "place"),
    [
        (3, "left"),
        *(pytest.param(*x, marks=pytest.mark.long) for x in ((3, ""), (1, "left"), (1, ""))),
    ],
)
def test_one_wrong_bit_ends_the_run(train, tmp_path, monkeypatch, step, place):
    """Of what is trained on, and of what is left; by the weights that drew, before it is trained
    on."""
    original = Stints.draw

    def draw(stints, number, *rest):
        found = original(stints, number, *rest)
        if number == step - 1:
            groups = found.left if place == "left" else [found.ended[i] for i in found.kept]
            tell_a_lie([g.completions for g in groups], found.version.step, least=1)
        return found

    monkeypatch.setattr(Stints, "draw", draw)
    with pytest.raises(LogprobMismatchError, match=rf"^step {step}: 1 of [0-9]+ log-probs differ"):
        train(tmp_path, ONE)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == (step if step == 1 else step - 1)


@pytest.mark.long
def test_without_the_comparison(train, whole, tmp_path):
    """What is on-policy and trained on is compared alone; nothing moves."""
    summary, rows = train(tmp_path, (*ONE, "rollout.check_stale=false"))
    expected, with_it = whole(ONE)[1]
    assert summary["weights_digest"] == expected["weights_digest"]
    assert [r["train/loss"] for r in rows[1:]] == [r["train/loss"] for r in with_it[1:]]
    first = saved(tmp_path)[0]
    assert summary["logprob_tokens_compared"] == sum(len(x.token_ids) for x in first)


@pytest.mark.long
@pytest.mark.parametrize("more", BESIDE, ids=["critic", "draft", "reference"])
def test_whatever_learns_beside_the_policy(train, whole, tmp_path, monkeypatch, capsys, more):
    """A critic, for which the policy waits two steps; a draft, which moves nothing; a KL."""
    words = (*ONE, *more)
    assert whole(words)[1][0]["logprob_mismatches"] == 0
    assert replayed(whole(words)[0] / "run", capsys)[0] == 0
    if more is BESIDE[1]:
        assert whole(words)[1][0]["weights_digest"] == whole(ONE)[1][0]["weights_digest"]
    assert_resumed(train, whole, tmp_path, monkeypatch, words)


@pytest.mark.long
def test_a_budget_that_no_sample_exceeds_moves_nothing(whole):
    """Neither a byte of what is drawn and logged nor a weight."""
    plain = (*WORDS, *PROCESS, "rollout.max_staleness=1")
    folder, (found, _) = whole((*plain, "rollout.partial_tokens=7"))
    assert found == whole(plain)[1][0]
    assert left_in(folder)[0] == left_in(whole(plain)[0])[0]
