"""Samples that go on under newer weights while others are trained (rollout.max_staleness with
rollout.partial_tokens): which version draws a token, what its log-prob is of, and what corrects it;
with one engine or several in processes of their own."""

from contextlib import closing
from itertools import accumulate

import pytest
import torch
from run_children import has_lines, in_one_process, open_run, run_cli
from test_engine_replicas import dying
from test_partial_rollouts import saved
from test_replay import replayed
from test_stale_parts import EVERY_TWO, ONE, PROCESS
from test_stale_rollouts import left_in

from samebit.recipes import grpo
from samebit.recipes.data.samples import drawn_sample
from samebit.recipes.grpo import GrpoRecipe
from samebit.recipes.run.batches import own_micro_batches, rows_by_sample
from samebit.recipes.run.metrics import read_rows
from samebit.rollout.types import Completion
from samebit.trainer.checkpoint import list_checkpoints

BUDGET, CLIP = 2, 1.25
KEPT = ("trainer.checkpoint_every=1", "trainer.keep_checkpoints=9")
TRUNCATED = ("algorithm=rloo", f"algorithm.tis_clip={CLIP}")
APART = tuple(x for x in ONE if x not in PROCESS) + ("placement=process",)


@pytest.fixture
def one_process(monkeypatch):
    """Rewards and engines run in this process; draws are another thread's all the same."""
    in_one_process(monkeypatch.setattr)
    monkeypatch.setattr(grpo, "write_report", lambda *_, **__: None)


@pytest.fixture(scope="module")
def expected(whole):
    """A run whose engine is in its own process: its folder, and what it gave."""
    with pytest.MonkeyPatch.context() as patch:
        in_one_process(patch.setattr)
        return whole(ONE)


def as_drawn(x):
    """What was drawn of a saved sample, to train on."""
    completion = Completion(
        request_id="",
        sample_id=x.sample_id,
        token_ids=(*x.token_ids.tolist(),),
        logprobs=(*x.logprobs.tolist(),),
        finish_reason="stop",
        version_spans=x.version_spans,
    )
    return drawn_sample(x.prompt_ids.tolist(), completion)


def by_version(run, checkpoints, samples):
    """By optimizer step the weights' digest, and their log-probs of samples' tokens, by sample: one
    forward pass of each whole sample."""
    found = {}
    with open_run(run) as session, closing(GrpoRecipe(run, session)) as recipe:
        for checkpoint in (None, *checkpoints):
            if checkpoint is not None:
                recipe.trainer.load_state_dict(checkpoint.load())
            batches = own_micro_batches(samples, run.trainer, recipe.trainer)
            rows = rows_by_sample(batches, recipe.trainer.logprobs(batches))
            found[recipe.trainer.step] = recipe.trainer.digest(), rows
    return found


def drawers(sample):
    """The version span of each of its tokens."""
    spans = [next(s for s in sample.version_spans[::-1] if s.start <= t) for t in range(7)]
    return spans[: len(sample.token_ids)]


@pytest.fixture
def checked(whole, resolved, runs, one_process):
    """checked(words): the saved samples by step, the log's rows, and `by_version` of them all."""

    def run(words):
        folder, (_, rows) = whole(words)
        steps = saved(folder)
        samples = [as_drawn(x) for step in steps for x in step]
        checkpoints = list_checkpoints(folder / "run" / "checkpoints")
        another = runs.resolve("another", *words)
        return steps, rows[1:], by_version(another, checkpoints, samples)

    return run


@pytest.mark.parametrize("words", [EVERY_TWO, pytest.param(ONE, marks=pytest.mark.long)])
def test_a_token_is_of_the_version_that_drew_it(checked, words):
    """Its log-prob is that version's of a context which it has computed whole, and no other's; what
    corrects a token is how far the weights that it trains have moved from that."""
    steps, rows, versions = checked((*words, *KEPT, *TRUNCATED))
    differing = 0
    for step, (samples, row) in enumerate(zip(steps, rows, strict=True)):
        pairs = []  # of each token, its log-prob by the weights that it trains, and as it was drawn
        for sample in samples:
            found = {v: logprobs[sample.sample_id] for v, (_, logprobs) in versions.items()}
            for t, (span, drawn) in enumerate(
                zip(drawers(sample), sample.logprobs.tolist(), strict=True)
            ):
                assert span.version.digest == versions[span.version.step][0]
                assert drawn == found[span.version.step][t]
                differing += all(drawn != x[t] for v, x in found.items() if v != span.version.step)
                pairs.append((found[step][t], drawn))
        ratio = torch.exp(torch.tensor([x for x, _ in pairs]) - torch.tensor([x for _, x in pairs]))
        assert row["train/ratio"] == pytest.approx(float(ratio.double().mean()), rel=1e-12)
        assert row["train/tis_fraction"] == float((ratio > CLIP).double().mean())
        oldest = min(s.version.step for x in samples for s in x.version_spans)
        assert row["rollout/oldest_weight_step"] == oldest
    assert differing > 50
    assert any(0 < row["train/tis_fraction"] < 1 for row in rows)


@pytest.mark.parametrize("words", [ONE, pytest.param(EVERY_TWO, marks=pytest.mark.long)])
def test_which_version_draws_a_token(whole, resolved, one_process, words):
    """That of the step whose stint draws it: token t of a sample comes t // BUDGET stints behind
    the one that began the sample, so versions change at multiples of BUDGET alone; and no token is
    older than a dry run says."""
    folder, (_, rows) = whole(words)
    settings, schedule = resolved(words).rollout, read_rows(folder / "run" / "schedule.jsonl")
    begins = [0, *accumulate(row["rollout/stints"] for row in rows[1:])]
    lens, ages = set(), set()
    trained = [(step, x) for step, samples in enumerate(saved(folder), 1) for x in samples]
    for trains, sample in trained:
        lens.add(len(sample.version_spans))
        begun = sample.sample_id >> 32  # the stint, in the place of the step
        for t, span in enumerate(drawers(sample)):
            step = sum(begin <= begun + t // BUDGET for begin in begins)
            assert span.version.step == settings.drawn_after(step)
            ages.add(trains - 1 - settings.drawn_after(step))
            assert schedule[step - 1]["version"] == [span.version.step, span.version.digest]
            assert span.recomputed is bool(span.start)
            assert span.start % BUDGET == 0
    assert lens >= {1, 2}
    assert settings.max_staleness < max(ages) <= settings.most_token_staleness


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "replicas", [pytest.param(1, marks=LONG), 2, pytest.param(3, marks=LONG)], ids=str
)
def test_any_number_of_engines_draws_the_same(expected, runs, capsys, replicas):
    """To the byte of rollouts, schedule and checkpoints, whoever goes on with which sample."""
    folder, result = expected
    assert runs.train("run", *APART, f"placement.replicas={replicas}")[:2] == result
    assert left_in(runs.folder) == left_in(folder)
    assert replayed(runs.folder / "run", capsys)[0] == 0


@LONG
@pytest.mark.parametrize("lines", [2, 3, 4])
def test_killed_and_resumed_with_other_engines(expected, runs, kill_when, lines):
    """Two, then three or one: whatever of a later step was drawn."""
    folder, result = expected
    condition = has_lines(runs.folder / "run" / "metrics.jsonl", lines)
    kill_when(condition, ["grpo", *runs.arguments("run", *APART, "placement.replicas=2")], run_cli)
    last = "placement.replicas=3" if lines % 2 else "placement.replicas=1"
    assert runs.train("run", *APART, last, "resume=true")[:2] == result
    assert left_in(runs.folder) == left_in(folder)


@LONG
def test_an_engine_that_dies(expected, runs, monkeypatch):
    """While samples go on, and as weights are about to move: the others draw the same."""
    moments = [("_take", 9), ("send", 2)]
    deaths = dying(monkeypatch, moments)
    folder, result = expected
    assert runs.train("run", *APART, "placement.replicas=2")[:2] == result
    assert left_in(runs.folder) == left_in(folder)
    assert sorted(deaths) == sorted(name for name, _ in moments)
