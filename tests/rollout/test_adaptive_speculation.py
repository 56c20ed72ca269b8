"""Speculation that does not pay costs little: rounds are few, and steps in between overlap."""

import dataclasses
import itertools

import pytest
from helpers import make_prompts, outcomes
from late_runner import assert_idle, assert_same

from samebit.recipes.verification.speculation import write_random_draft
from samebit.rollout.engine import Engine
from samebit.rollout.runtime.drafts import Drafts
from samebit.rollout.speculative.proposer import MOST_UNREAD, Proposal, Proposer, ProposerError
from samebit.rollout.types import SamplingParams

PROMPT = list(range(1, 11))
PROMPTS = make_prompts(5, 16, 33)
LONG = SamplingParams(n=2, max_new_tokens=150, ignore_eos=True)
IDS = [[0, 1]]


class Guesser(Proposer):
    """Proposes what a test says; `rooms`: what there was room for, by call."""

    def __init__(self, parts):
        super().__init__(parts)
        self.rooms = []

    def propose(self, contexts):
        self.rooms.append([context.room for context in contexts])
        return [self.guess(context) for context in contexts]

    def guess(self, context):
        return Proposal()


class Wrong(Guesser):
    """Guesses that never hold: what was drawn, and so a test knows, and one more."""

    truth: dict[int, tuple[int, ...]] = {}

    def guess(self, context):
        sample = context.sample
        start = len(context.token_ids) - sample.prompt_len
        following = self.truth[sample.sample_id][start : start + context.room]
        return Proposal([(token + 1) % self.parts.vocab_size for token in following])


class Sure(Wrong):
    """Guesses that hold, and how likely it says that each is."""

    said = (0.9, 0.5, 0.1, 1.0, 1.0)

    def guess(self, context):
        guesses = [(token - 1) % self.parts.vocab_size for token in super().guess(context)[0]]
        return Proposal(guesses, self.said[: len(guesses)])


class Unsure(Sure):
    said = (0.05,) * 5


class OneLess(Sure):
    said = (1.0, 1.0, 1.0, 1.0)


class TooSure(Sure):
    said = (1.0, 1.5, 1.0, 1.0, 1.0)


class NotANumber(Sure):
    said = (float("nan"),) * 5


class NoNumber(Sure):
    said = ("high",) * 5


def of_this_file(kind, truth=()):
    """The setting that names a proposer of this file."""
    kind.truth = {c.sample_id: c.token_ids for c in itertools.chain(*truth)}
    return {"speculative": f"{__name__}:{kind.__name__}"}


@pytest.mark.parametrize("kind", [Guesser, Wrong])
def test_useless_guesses_do_not_cost_the_overlap(plain, make_late, kind):
    """Nothing proposed, or nothing right: few rounds, and every other step is planned ahead."""
    truth = plain.generate([PROMPT], LONG, IDS)
    engine = make_late(1, **of_this_file(kind, truth))
    assert_same(engine.generate([PROMPT], LONG, IDS)[0], truth[0])
    rounds = len(engine.speculation.proposer.rooms)
    ahead = sum(
        ("launch", i + 1) in engine.runner.events[: engine.runner.events.index(("wait", i))]
        for i in range(149)
    )
    assert 0 < rounds < 50
    assert ahead >= 149 - 2 * rounds
    assert ahead > 99
    assert_idle(engine)


def test_guesses_that_are_always_asked_for(plain, make_late):
    """Without the adaptive choice each step is a round, planned behind the one before."""
    truth = plain.generate([PROMPT], LONG, IDS)
    engine = make_late(1, **of_this_file(Guesser), adaptive_drafts=False)
    assert_same(engine.generate([PROMPT], LONG, IDS)[0], truth[0])
    assert len(engine.speculation.proposer.rooms) == 149
    kinds = [kind for kind, _ in engine.runner.events]
    assert kinds == ["launch", "wait"] * 150


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_seqs": 3, "prefill_chunk": 7, "max_batch_tokens": 20},
        {"page_size": 4, "kv_cache_tokens": 100},
        {"depth": 2},
    ],
    ids=str,
)
def test_rounds_among_steps_that_overlap(plain, make_late, settings):
    """Guesses that hold, in some steps: those between are planned on lengths that are known."""
    params = SamplingParams(n=3, max_new_tokens=40, stop_token_ids=range(1, 4))
    prompts, ids = [PROMPT, PROMPT[:3]], [[0, 1, 2], [3, 4, 5]]
    truth = plain.generate(prompts, params, ids)
    settings = {"depth": 1} | settings
    engine = make_late(settings.pop("depth"), **of_this_file(Sure, truth), **settings)
    plan = itertools.cycle([0, 5, 0, 0, 0, 2, 5, 0, 0])
    engine.speculation.choose = lambda slots: next(plan)
    for _ in range(2):
        for own, group in zip(engine.generate(prompts, params, ids), truth, strict=True):
            assert_same(own, group)
    assert engine.accept_lengths.num_right > 40
    assert_idle(engine)


def test_two_runs_ask_alike(plain, make_late):
    """What decides is counted, whatever has arrived when: with any number of steps in flight the
    same tokens, and at one number the same rounds."""
    truth = plain.generate([PROMPT, PROMPT[:3]], LONG, [[0, 1], [2, 3]])
    seen = []
    for depth in (1, 1, 2):
        engine = make_late(depth, **of_this_file(Wrong, truth), max_num_seqs=3)
        found = engine.generate([PROMPT, PROMPT[:3]], LONG, [[0, 1], [2, 3]])
        for own, group in zip(found, truth, strict=True):
            assert_same(own, group)
        seen.append((engine.speculation.proposer.rooms, engine.accept_lengths))
    assert seen[0] == seen[1]


def test_a_draft_reads_what_was_drawn_now_and_then(make_engine, engine, tmp_path):
    """Where nothing is guessed: once in so many steps, without room, while others are in flight."""
    write_random_draft(tmp_path / "draft", engine.model_config)
    own = make_engine(speculative="eagle3", draft_model=str(tmp_path / "draft"), overlap=True)
    own.speculation.choose = lambda slots: 0
    proposer, lens, kept = own.speculation.proposer, [], []
    step = proposer._step

    def reading(states, token_ids, layout):
        lens.append(layout.lens.tolist())
        kept.append(len(own.step_loop._flights))
        return step(states, token_ids, layout)

    proposer._step = reading
    params = SamplingParams(max_new_tokens=4 * MOST_UNREAD + 2, ignore_eos=True)
    truth = engine.generate(PROMPTS[:1], params, [[0]])
    assert outcomes(own.generate(PROMPTS[:1], params, [[0]])) == outcomes(truth)
    assert lens == [[4], [15], [16], [16], [16]], "the prompt first"
    assert kept == [0, 1, 1, 1, 1]
    assert own.accept_lengths.verifications == 0


@pytest.mark.parametrize(
    ("kind", "adaptive", "places"),
    [(Sure, True, 2), (Sure, False, 5), (Unsure, True, 0)],
)
def test_unlikely_guesses_are_not_verified(plain, late_folder, kind, adaptive, places):
    """The third is hardly reached by what is said of it, and so are those behind."""
    truth = plain.generate([PROMPT], LONG, IDS)
    own = Engine(late_folder, **of_this_file(kind, truth), adaptive_drafts=adaptive)
    assert outcomes(own.generate([PROMPT], LONG, IDS)) == outcomes(truth)
    lengths = own.accept_lengths
    assert lengths.guessed == lengths.right
    assert [bool(n) for n in lengths.guessed] == [i < places for i in range(5)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OneLess, "gave 4 confidences for 5 tokens"),
        (TooSure, r"gave confidences \[1.0, 1.5, .*; each must be in \[0, 1\]"),
        (NotANumber, r"gave confidences \[nan, .*; each must be in \[0, 1\]"),
        (NoNumber, "gave no confidences: could not convert string to float: 'high'"),
    ],
)
def test_confidences_that_are_wrong(plain, late_folder, kind, message):
    truth = plain.generate([PROMPT], LONG, IDS)
    own = Engine(late_folder, **of_this_file(kind, truth))
    with pytest.raises(ProposerError, match=f"the proposer {__name__}:{kind.__name__} {message}"):
        own.generate([PROMPT], LONG, IDS)
    assert_idle(own)


class OneOfMany(Sure):
    """Right guesses, for the first of the samples alone."""

    said = (1.0,) * 5

    def guess(self, context):
        return super().guess(context) if context.sample.sample_id == 0 else Proposal()


def test_one_sample_with_guesses_among_many(plain, late_folder, monkeypatch):
    """Its rows are few where there are no graphs; as if there were, all would be padded to it."""
    params, ids = SamplingParams(n=9, max_new_tokens=20, ignore_eos=True), [[*range(9)]]
    truth, most = plain.generate([PROMPT], params, ids), {}
    for pads in (False, True):
        own, most[pads] = Engine(late_folder, **of_this_file(OneOfMany, truth)), []
        length = own.speculation._length
        length._cost = dataclasses.replace(length._cost, pads=pads)
        cut = Drafts.cut

        def counting(drafts, to):
            most[pads].append(to)  # noqa: B023
            return cut(drafts, to)  # noqa: B023

        monkeypatch.setattr(Drafts, "cut", counting)
        assert outcomes(own.generate([PROMPT], params, ids)) == outcomes(truth)
        monkeypatch.setattr(Drafts, "cut", cut)
    assert max(most[False]) == 5
    assert not most[True]
