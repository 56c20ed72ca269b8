"""rollout.partial_tokens: what is drawn under which weights, and trained on when, is a function of
seed, data and weights; a sample that goes on is the one that would have been drawn in one go."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from partial_schedule import PROMPTS, SAMPLES, places_of, schedule, stints_of
from run_children import has_lines, in_one_process, run_cli_in_one_process
from test_signals import signal_before_call
from test_stale_rollouts import assert_stopped_and_resumed, left_in

from samebit.recipes import grpo
from samebit.recipes.grpo import LogprobMismatchError
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.partial_rollouts import STATE, PartialRollouts
from samebit.recipes.run.rollouts import list_rollouts, load_dropped, load_rollout
from samebit.recipes.run.sampling import RolloutSource
from samebit.recipes.run.signals import Stopped
from samebit.trainer.checkpoint import list_checkpoints
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.weight_sync.types import VersionSpan

MOST = 7
WORDS = (f"rollout.samples_per_prompt={SAMPLES}", f"rollout.max_new_tokens={MOST}")
WORDS += ("trainer.num_steps=4", "trainer.background_checkpoints=false", "rollout.eval_every=4")
WORDS += ("logger.save_rollouts=true", "reward.args.control=/no", "seed=27")
PARTIAL = (*WORDS, "rollout.partial_tokens=2")
NAMES = ("stints", "prompts_drawn", "continued_tokens", "pending_samples", "waiting_samples")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Rewards and engines run in this process."""
    in_one_process(monkeypatch.setattr)
    monkeypatch.setattr(grpo, "write_report", lambda *_, **__: None)


def saved(folder):
    """The samples of each step, in the order in which they were trained on."""
    return [load_rollout(file) for file in list_rollouts(folder / "run").values()]


def bits(sample):
    """Tokens and log-probs, to the bit."""
    return sample.token_ids.tolist(), sample.logprobs.numpy().tobytes()


def test_a_budget_that_no_sample_exceeds_moves_nothing(whole):
    """Neither a byte of what is drawn nor a weight, a metric or a comparison. Without a budget the
    weights that draw a step are those that it trains, and no schedule is logged."""
    plain, (summary, rows) = whole(WORDS)
    folder, found = whole((*WORDS, f"rollout.partial_tokens={MOST}"))
    logs = [(x / "run" / "schedule.jsonl").exists() for x in (plain, folder)]
    assert logs == [False, True]
    own = [{k: v for k, v in row.items() if k not in added()} for row in found[1]]
    assert (found[0], own) == (summary, rows)
    assert left_in(folder)[0][0] == left_in(plain)[0][0]
    figures = [[row[f"rollout/{name}"] for name in NAMES] for row in found[1][1:]]
    assert figures == [[1, PROMPTS, 0, 0, 0]] * 4


def added():
    """Metrics of partial rollouts alone."""
    own = (*NAMES, "older_token_fraction", "oldest_weight_step")
    return {f"rollout/{name}" for name in own}


def test_at_learning_rate_0_samples_are_those_drawn_in_one_go(whole):
    """To the bit, whatever the stints; and which are trained on when follows from their lengths."""
    still = "trainer.optimizer.lr=0"
    alone = [x for step in saved(whole((*WORDS, still, "trainer.num_steps=7"))[0]) for x in step]
    in_one_go = {sample.sample_id: sample for sample in alone}
    folder, (summary, rows) = whole((*PARTIAL, still))
    steps = saved(folder)
    for sample in (x for step in steps for x in step):
        assert bits(sample) == bits(in_one_go[sample.sample_id])
        assert sample.reward == in_one_go[sample.sample_id].reward
        assert sample.prompt_ids.tolist() == in_one_go[sample.sample_id].prompt_ids.tolist()
    expected, stints = schedule(stints_of(alone), 4)
    assert [places_of(step) for step in steps] == expected
    assert [row["rollout/stints"] for row in rows[1:]] == stints
    assert sum(stints) > 4
    assert sum(expected, []) != sorted(sum(expected, []))  # somebody waits for nobody


DYNAMIC = ("rollout.partial_tokens=2", "rollout.dynamic_sampling=true")
SOME = ("reward.name=run_children:score_some", "reward.args.every=2")


@pytest.mark.long
def test_dynamic_sampling_goes_by_what_is_finished(whole):
    """Prompts without a spread count as little as those that are not finished."""
    still = (*WORDS, *SOME, "trainer.optimizer.lr=0")
    alone = [x for step in saved(whole((*still, "trainer.num_steps=24"))[0]) for x in step]
    rewards = [[x.reward for x in alone[i : i + SAMPLES]] for i in range(0, len(alone), SAMPLES)]
    equal = [place for place, group in enumerate(rewards) if len({*group}) == 1]
    expected, stints = schedule(stints_of(alone), 4, equal)
    folder, (_, rows) = whole((*still, *DYNAMIC))
    assert [places_of(step) for step in saved(folder)] == expected
    assert [row["rollout/stints"] for row in rows[1:]] == stints


def test_dropped_prompts(whole, train, tmp_path, monkeypatch):
    """They are left to no later step; a run that dies goes on with what is."""
    words = (*WORDS, *SOME, *DYNAMIC)
    folder, (_, rows) = whole(words)
    trained = {place for step in saved(folder) for place in places_of(step)}
    for step in saved(folder):
        pairs = zip(step[::2], step[1::2], strict=True)
        assert all(one.reward != other.reward for one, other in pairs)
    dropped = [load_dropped(file) for file in list_rollouts(folder / "run").values()]
    for row, each in zip(rows[1:], dropped, strict=True):
        assert row["rollout/refills"] == row["rollout/stints"] - 1
        assert row["rollout/kept_fraction"] == PROMPTS / (PROMPTS + len(each) / SAMPLES)
    out = [PROMPTS * (i >> 32) + (i >> 12 & 7) for each in dropped for i in each]
    assert {*Counter(out).values()} == {SAMPLES}
    assert trained.isdisjoint(out)
    left = list_checkpoints(folder / "run" / "checkpoints")[-1].load()[STATE]["places"]
    begun = range(sum(row["rollout/prompts_drawn"] for row in rows[1:]))
    assert sorted([*trained, *{*out}, *left]) == [*begun]
    assert_resumed(train, folder, rows, tmp_path, monkeypatch, words)


def test_spans_and_log_probs_are_those_of_the_draws(whole, train, tmp_path, monkeypatch):
    """Each sample is what the engine gave of it, one part behind another, and its spans say by
    which version; every token that was drawn is compared once. A second run is equal, although its
    engine has memory of its own."""
    expected, result = whole(PARTIAL)
    parts, original = {}, RolloutSource.complete

    def complete(source, contexts, params, ids, *rest):
        found = original(source, contexts, params, ids, *rest)
        version = source._engine.weight_version
        for context, group in zip(contexts, found, strict=True):
            for c in group:
                parts.setdefault(c.sample_id, []).append((tuple(context), c, version))
        return found

    monkeypatch.setattr(RolloutSource, "complete", complete)
    words = (*PARTIAL, "placement=process", "placement.transport=file")
    assert train(tmp_path, words) == result
    assert left_in(tmp_path) == left_in(expected)
    most = Counter()
    for sample in (x for step in saved(tmp_path) for x in step):
        tokens, logprobs, spans = (), (), []
        for context, part, version in parts[sample.sample_id]:
            assert context == (*sample.prompt_ids.tolist(), *tokens)
            assert 1 <= len(part.token_ids) <= 2
            if not spans or spans[-1].version != version:
                spans.append(VersionSpan(len(tokens), version, recomputed=bool(spans)))
            tokens, logprobs = tokens + part.token_ids, logprobs + part.logprobs
        assert sample.token_ids.tolist() == [*tokens]
        assert sample.logprobs.tolist() == [*logprobs]
        assert sample.version_spans == tuple(spans)
        most[len(spans)] += 1
    assert most.keys() >= {1, 2, 3}
    held_out = 4 + 4  # evaluations, which are drawn whole
    drawn = [part for sample in parts.values() for part in sample]
    evaluations = [c for _, c, _ in drawn if c.sample_id >> 63]
    assert len(evaluations) == held_out
    tokens = sum(len(c.token_ids) for _, c, _ in drawn if not c.sample_id >> 63)
    assert result[0]["logprob_tokens_compared"] == tokens


def test_metrics(whole):
    """Of the run at hand: all that was drawn is trained on, or waits."""
    folder, (_, rows) = whole(PARTIAL)
    assert [row["rollout/older_token_fraction"] for row in rows[1:3]][0] == 0
    begun = trained = 0
    for row, step in zip(rows[1:], saved(folder), strict=True):
        newest = max(span.version for s in step for span in s.version_spans).step
        drawn = [(s.version_spans, len(s.token_ids)) for s in step]
        older = sum(
            next((x.start for x in spans if x.version.step == newest), length)
            for spans, length in drawn
        )
        assert row["rollout/older_token_fraction"] == older / sum(n for _, n in drawn)
        oldest = min(span.version for s in step for span in s.version_spans).step
        assert row["rollout/oldest_weight_step"] == oldest
        assert (row["train/ratio"] == 1.0) is (older == 0)
        begun, trained = begun + row["rollout/prompts_drawn"], trained + PROMPTS
        left = row["rollout/pending_samples"] + row["rollout/waiting_samples"]
        assert left == SAMPLES * (begun - trained)
    assert rows[-1]["rollout/continued_tokens"] > 0


def test_what_a_checkpoint_holds(whole):
    """What is left of the steps before it, and nothing else."""
    folder, (_, rows) = whole(PARTIAL)
    for checkpoint in list_checkpoints(folder / "run" / "checkpoints"):
        state, row = checkpoint.load()[STATE], rows[checkpoint.step]
        left = row["rollout/pending_samples"] + row["rollout/waiting_samples"]
        assert len(state["lens"]) == SAMPLES * len(state["places"]) == left > 0
        pending = [
            n < MOST and why == "length"
            for n, why in zip(state["lens"].tolist(), state["finish_reasons"], strict=True)
        ]
        assert sum(pending) == row["rollout/pending_samples"]


@pytest.mark.parametrize(
    ("owner", "name", "number", "step"),
    [
        (MegatronTrainer, "train_step", 4, 3),  # what the step has drawn and begun is dropped
        pytest.param(RolloutSource, "complete", 5, 1, marks=pytest.mark.long),
        pytest.param(PartialRollouts, "compare_taken", 3, 2, marks=pytest.mark.long),
    ],
)
def test_stopped_and_resumed(train, whole, tmp_path, monkeypatch, owner, name, number, step):
    """By a signal, between any two of what a step does."""
    fault = owner, name, number
    assert_stopped_and_resumed(train, whole, tmp_path, monkeypatch, fault, PARTIAL, step)


def test_dead_and_resumed(train, whole, tmp_path, monkeypatch):
    """With samples pending that the checkpoint has, and others that are drawn again."""
    expected, (_, rows) = whole(PARTIAL)
    assert_resumed(train, expected, rows, tmp_path, monkeypatch, PARTIAL)


def assert_resumed(train, expected, rows, folder, monkeypatch, words):
    """A run that dies in step 4 goes on from step 2 to the same bytes."""
    original = PartialRollouts.compare_taken

    def dies(rollouts, *rest):
        if 4 in rollouts._left:
            raise KeyboardInterrupt
        return original(rollouts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PartialRollouts, "compare_taken", dies)
        with pytest.raises(KeyboardInterrupt):
            train(folder, words)
    assert train(folder, words, resume=True)[1] == rows
    assert left_in(folder) == left_in(expected)


@pytest.mark.long
@pytest.mark.parametrize("lines", [1, 2, 3, 4])
def test_killed_and_resumed(runs, train, whole, kill_when, lines):
    """By SIGKILL, from a checkpoint or from none."""
    expected, result = whole(PARTIAL)
    condition = has_lines(runs.folder / "run" / "metrics.jsonl", lines)
    kill_when(condition, ["grpo", *runs.arguments("run", *PARTIAL)], run_cli_in_one_process)
    assert train(runs.folder, PARTIAL, resume=True) == result
    assert left_in(runs.folder) == left_in(expected)


@pytest.mark.long
def test_replicas_share_the_parts(runs, whole, monkeypatch):
    """Two engines in processes of their own, whoever goes on with which sample."""
    expected, (summary, rows) = whole(PARTIAL)
    monkeypatch.undo()
    words = ("placement=process", "placement.transport=gloo", "placement.replicas=2")
    assert runs.train("run", *PARTIAL, *words)[:2] == (summary, rows)
    assert left_in(runs.folder) == left_in(expected)


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [["data=2"], ["tensor=2"], ["context=2"], ["pipeline=2", "placement.transport=stages"]],
    ids=lambda layout: layout[0],
)
def test_layouts_compare_what_is_left_too(runs, run_ranks, layout):
    """Every token once, on whatever ranks: the same number on all."""
    words = [x if "." in x else f"trainer.parallel.{x}" for x in layout]
    codes, said = run_ranks(runs.arguments("run", *PARTIAL, *words))
    assert codes == [0, 0], said
    compared = sum(row["train/logprob_tokens_compared"] for row in runs.rows("run")[1:])
    drawn = sum(len(sample.token_ids) for step in saved(runs.folder) for sample in step)
    [newest, *_] = list_checkpoints(runs.folder / "run" / "checkpoints")[::-1]
    assert compared == drawn + int(next(newest.load_all())[STATE]["lens"].sum())
    assert json.loads((runs.folder / "run" / "summary.json").read_text())["logprob_mismatches"] == 0


@pytest.mark.long
def test_several_optimizer_steps(whole):
    """The first compares, the later ones do not."""
    _, (summary, rows) = whole((*PARTIAL, "trainer.batch_size=2"))
    assert summary["logprob_mismatches"] == 0
    assert all(row["train/logprob_tokens_compared"] > 10 for row in rows[1:])


@pytest.mark.parametrize("place", ["trained", "left"])
def test_one_wrong_bit_ends_the_run(train, tmp_path, monkeypatch, place):
    """Of what is trained on, and of what is left to later steps; before weights change."""
    original = PartialRollouts.take

    def take(rollouts, step, *rest):
        of_step = original(rollouts, step, *rest)
        if step == 2:
            left = [group.completions for group in rollouts._left[step]]
            groups = left if place == "left" else of_step.drawn.completions
            tell_a_lie(groups, rollouts._trainer.step)
        return of_step

    monkeypatch.setattr(PartialRollouts, "take", take)
    with pytest.raises(LogprobMismatchError, match=r"^step 2: 1 of [0-9]+ log-probs differ"):
        train(tmp_path, PARTIAL)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 2


def tell_a_lie(groups, step, least=2):
    """The last log-prob of a sample that weights of this step went on is the next number; least:
    so many versions have drawn it."""
    group, i = next((g, i) for g in groups for i, c in enumerate(g) if goes_on(c, step, least))
    *others, last = group[i].logprobs
    lie = float(np.nextafter(np.float32(last), np.float32(-9)))
    group[i] = replace(group[i], logprobs=(*others, lie))


def goes_on(completion, step, least):
    """Whether these weights drew its newest tokens, and earlier ones others."""
    spans = completion.version_spans
    return len(spans) >= least and spans[-1].version.step == step


def test_without_the_comparison_of_what_is_left(train, whole, tmp_path):
    """It costs a pass, and moves nothing."""
    summary, rows = train(tmp_path, (*PARTIAL, "rollout.check_stale=false"))
    expected, with_it = whole(PARTIAL)[1]
    assert summary["weights_digest"] == expected["weights_digest"]
    for row, other in zip(rows[1:], with_it[1:], strict=True):
        assert row["train/loss"] == other["train/loss"]
    assert 0 < summary["logprob_tokens_compared"] < expected["logprob_tokens_compared"]


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        ("algorithm=ppo", "critic.warmup_steps=2", "critic.optimizer.lr=1e-2"),
        ("draft.train=online", "draft.layers=[1,2]", "ttt.passes=3", "engine.speculative=eagle3")
        + ("engine.adaptive_drafts=false", "engine.num_draft_tokens=3"),
        ("algorithm=grpo_kl", "algorithm.kl_coef=0.1", "algorithm.kl_in=reward"),
    ],
    ids=["critic", "draft", "reference"],
)
def test_whatever_learns_beside_the_policy(train, whole, tmp_path, monkeypatch, more):
    """It is trained on whole samples, and resumes with them."""
    words = (*PARTIAL, *more)
    expected, result = whole(words)
    assert result[0]["logprob_mismatches"] == 0
    with monkeypatch.context() as patch:
        signal_before_call(patch, PartialRollouts, "take", 4)
        with pytest.raises(Stopped):
            train(tmp_path, words)
    assert train(tmp_path, words, resume=True) == result
    assert left_in(tmp_path)[0] == left_in(expected)[0]


@pytest.mark.long
def test_two_processes_go_on_for_one(runs, run_ranks, train):
    """With gradient segments; the first process has saved what is pending for both."""
    words = (*PARTIAL, "numerics.grad_segments=2", "trainer.checkpoint_every=1")
    result = train(runs.folder, words)
    for checkpoint in list_checkpoints(runs.folder / "run" / "checkpoints"):
        if checkpoint.step > 1:
            for file in sorted(checkpoint.path.iterdir()):
                file.unlink()
            checkpoint.path.rmdir()
    (runs.folder / "run" / "summary.json").unlink()
    more = (*words, "trainer.parallel.data=2", "resume=true")
    codes, said = run_ranks(runs.arguments("run", *more))
    assert codes == [0, 0], said
    assert runs.rows("run") == result[1]
