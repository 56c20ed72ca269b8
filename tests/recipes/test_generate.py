"""Generate functions of users': turns, tools, and what is refused."""

import asyncio
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from samebit.kernels.top_tokens import top_tokens
from samebit.recipes.data.conversation import Conversation, GenerateError, GenerateRequest
from samebit.recipes.data.order import turn_id
from samebit.recipes.data.samples import drawn_sample
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.data.text import TextCodec
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run import generation
from samebit.recipes.run.generation import GenerateFunction
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams
from samebit.trainer.types import Sample

PARAMS = SamplingParams(max_new_tokens=24, ignore_eos=True)
VOCAB = 12


@pytest.fixture(scope="module")
def small(demo_model):
    """An engine with small pages, so that turns have whole ones to find again."""
    return Engine(demo_model, device="cpu", seed=5, kv_cache_tokens=1024, page_size=4)


@pytest.fixture(scope="module")
def text(demo_model):
    return TextCodec(demo_model)


def requests(text, count=1):
    problem = Problem(index=3, prompt="12345678=", label="8", metadata={}, where="d, line 4")
    prompt = tuple(text.encode(problem.prompt))
    given = {"problem": problem, "prompt_ids": prompt, "max_new_tokens": 24, "text": text}
    return [GenerateRequest(sample_id=16 + i, **given) for i in range(count)]


def drawn(function, engine, asked, params=PARAMS, timeout_s=60.0):
    """What a function makes of the requests."""
    sys.modules["mine"].current = function
    settings = RolloutSection(generate="mine:current", generate_timeout_s=timeout_s)
    loaded = GenerateFunction(settings, VOCAB)
    try:
        return loaded.draw(engine, asked, params)
    finally:
        loaded.close()


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    """A module of a user."""
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(stubborn=False))


def of(context, tokens, mask, **changes):
    """A sample of a context, of which nothing is trained on, and tokens."""
    given = {
        "sample_id": 16,
        "token_ids": [*context, *tokens],
        "loss_mask": [*[False] * len(context), *mask],
    }
    return Sample(**given | changes)


def test_turns_are_drawn_by_ids_of_their_own(small, text):
    """Each as the engine alone draws it after the same tokens; the same context twice, too."""
    seen = []

    async def talks(engine, request, params):
        talk = Conversation(request)
        await talk.draw(engine, replace(params, max_new_tokens=6))
        talk.add(text.encode("77"))
        before = list(talk.token_ids)
        again = await engine.draw(before, replace(params, max_new_tokens=6))
        await talk.draw(engine, replace(params, max_new_tokens=6))
        seen.append((before, again, talk.turns))
        return talk.sample()

    [response] = drawn(talks, small, requests(text))
    [(before, again, (first, second))] = seen
    prompt = list(requests(text)[0].prompt_ids)
    contexts, numbers = [prompt, before, before], [0, 1, 2]
    truth = small.generate(
        contexts, replace(PARAMS, max_new_tokens=6), [[turn_id(16, n)] for n in numbers]
    )
    for turn, [expected] in zip((first, again, second), truth, strict=True):
        assert (turn.token_ids, turn.logprobs) == (expected.token_ids, expected.logprobs)
    assert again.token_ids != second.token_ids
    assert response.token_ids == (*first.token_ids, *text.encode("77"), *second.token_ids)
    assert response.loss_mask == (True,) * 6 + (False,) * 2 + (True,) * 6
    assert response.logprobs == (*first.logprobs, 0.0, 0.0, *second.logprobs)
    assert (response.num_turns, response.finish_reason, response.sample_id) == (3, "length", 16)
    sample = drawn_sample(prompt, response)
    scores = small.score([sample.token_ids.tolist()])[0]
    assert [np.float32(s) for s in np.array([0, *scores])[sample.loss_mask]] == list(
        sample.logprobs[sample.loss_mask]
    )
    assert [(s.start, s.version) for s in sample.version_spans] == [(9, small.weight_version)]


def test_a_turn_finds_its_context_in_the_cache(small, text, monkeypatch):
    sizes, original = [], small.runner.forward

    def forward(batch, collect, rows):
        sizes.append(len(batch.input_ids))
        return original(batch, collect, rows)

    async def talks(engine, request, params):
        talk = Conversation(request)
        await talk.draw(engine, replace(params, max_new_tokens=8))
        talk.add(text.encode("12"))
        await talk.draw(engine, replace(params, max_new_tokens=2))
        return talk.sample()

    small.flush_cache()
    monkeypatch.setattr(small.runner, "forward", forward)
    drawn(talks, small, requests(text))
    # 9 of the prompt, 7 drawn; then 19 of which 16 are there; then one drawn.
    assert sizes == [9, *[1] * 7, 3, 1]


def test_a_turn_may_be_kept_in_part(small, text):
    """What was cut off is not there; what is added behind is not drawn."""

    async def cuts(engine, request, params):
        turn = await engine.draw(request.prompt_ids, replace(params, max_new_tokens=6))
        kept = turn.token_ids[:2]
        other = (turn.token_ids[2] + 1) % 11
        return of(request.prompt_ids, (*kept, other), (True, True, False))

    [response] = drawn(cuts, small, requests(text))
    assert response.loss_mask == (True, True, False)
    assert response.logprobs[2] == 0.0 != response.logprobs[1]


def test_of_truncated_turns_it_is_known_what_could_be_drawn(small, text):
    """By each turn's own limits, or without any; what is masked has no threshold."""
    params = replace(PARAMS, top_k=3, truncated_logprobs=True)

    async def narrows(engine, request, params):
        talk = Conversation(request)
        await talk.draw(engine, replace(params, max_new_tokens=2))
        talk.add(text.encode("7"))
        for top_k in (1, 0):
            await talk.draw(engine, replace(params, max_new_tokens=2, top_k=top_k))
        return talk.sample()

    [response] = drawn(narrows, small, requests(text), params)
    prompt = list(requests(text)[0].prompt_ids)
    tokens, threshold = list(response.token_ids), response.thresholds
    [[first]] = small.generate([prompt], replace(params, max_new_tokens=2), [[16]])
    assert (threshold[:2], response.logprobs[:2]) == (first.thresholds, first.logprobs)
    assert (threshold[2], response.logprobs[2]) == (0.0, 0.0)
    assert response.logprobs[3:5] == (0.0, 0.0)  # the only token that could be drawn
    assert threshold[5:] == (-math.inf,) * 2
    assert list(response.logprobs[5:]) == small.score([prompt + tokens])[0][-2:]
    sample = drawn_sample(prompt, response)
    assert sample.thresholds.tolist() == [*[0.0] * len(prompt), *threshold]
    with pytest.raises(GenerateError, match=KIND.format(*KINDS, True)):
        drawn(other_kind, small, requests(text), params)


async def _one(engine, request, params, tokens=4):
    turn = await engine.draw(request.prompt_ids, replace(params, max_new_tokens=tokens))
    return turn.token_ids, turn.logprobs


async def adds(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    return of(request.prompt_ids, (*tokens, 1), (True,) * 5)


async def changes(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    return of(request.prompt_ids, ((tokens[0] + 1) % 11, *tokens[1:]), (False, True, True, True))


async def trains_the_prompt(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    return of(request.prompt_ids[:-1], (request.prompt_ids[-1], *tokens), (True,) * 5)


async def other_logprobs(engine, request, params):
    tokens, logprobs = await _one(engine, request, params)
    rest = [0.0] * len(request.prompt_ids)
    wrong = [*rest, *logprobs[:3], np.nextafter(np.float32(logprobs[3]), np.float32(1))]
    return of(request.prompt_ids, tokens, (True,) * 4, logprobs=wrong)


def drawing(name, **changes):
    async def draws(engine, request, params):
        tokens, _ = await _one(engine, request, replace(params, **changes))
        return of(request.prompt_ids, tokens, (True,) * 4)

    draws.__name__ = name
    return draws


hotter = drawing("hotter", temperature=2.0)
without_logprobs = drawing("without_logprobs", logprobs=False)
cuts, goes_on = drawing("cuts", top_k=1), drawing("goes_on", min_new_tokens=1)


async def other_kind(engine, request, params):
    limited = replace(params, top_k=3, truncated_logprobs=not params.truncated_logprobs)
    tokens, _ = await _one(engine, request, limited)
    return of(request.prompt_ids, tokens, (True,) * 4)


async def has_thresholds(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    sample = of(request.prompt_ids, tokens, (True,) * 4)
    return replace(sample, thresholds=np.zeros(len(sample.token_ids), np.float32))


async def has_advantages(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    return of(request.prompt_ids, tokens, (True,) * 4, advantages=1.0)


async def has_returns(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    sample = of(request.prompt_ids, tokens, (True,) * 4)
    return replace(sample, returns=np.zeros(len(sample.token_ids), dtype=np.float32))


async def has_a_teacher(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    top = top_tokens(torch.zeros(4, 11), 2)
    return replace(of(request.prompt_ids, tokens, (True,) * 4), teacher_top=top)


async def other_prompt(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    return of((1, *request.prompt_ids[1:-1], 3), tokens, (True,) * 4)


async def other_id(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    return of(request.prompt_ids, tokens, (True,) * 4, sample_id=3)


async def too_long(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    return of(request.prompt_ids, (*tokens, *[1] * 21), (*[True] * 4, *[False] * 21))


async def text_instead(engine, request, params):
    return "19"


async def full(engine, request, params):
    talk = Conversation(request)
    await talk.draw(engine, params)
    await talk.draw(engine, params)


async def nearly_full(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    await engine.agenerate([[*request.prompt_ids, *tokens]], params)


async def adds_too_much(engine, request, params):
    Conversation(request).add([1] * 25)


async def adds_a_text(engine, request, params):
    Conversation(request).add("12")


async def adds_a_fraction(engine, request, params):
    Conversation(request).add([1.5])


async def adds_no_token(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    return of(request.prompt_ids, (*tokens, -1), (*[True] * 4, False))


async def without_the_prompt(engine, request, params):
    await engine.draw([1, 2], params)


async def races(engine, request, params):
    await asyncio.gather(*(_one(engine, request, params) for _ in range(2)))


async def leaves_a_turn(engine, request, params):
    tokens, _ = await _one(engine, request, params)
    sys.modules["mine"].left = asyncio.create_task(_one(engine, request, params))
    await asyncio.sleep(0)
    return of(request.prompt_ids, tokens, (True,) * 4)


async def several(engine, request, params):
    await engine.draw(request.prompt_ids, replace(params, n=2))


async def raises(engine, request, params):
    return {}["tool"]


async def exits(engine, request, params):
    raise SystemExit(3)


async def cancels(engine, request, params):
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


async def hangs(engine, request, params):
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not sys.modules["mine"].stubborn:
                raise
            sys.modules["mine"].stubborn = False


MASK = "with its loss mask set, but the engine did not draw it there after these tokens: mask it"
KINDS = "the full softmax", "what could be drawn"
KIND = "its loss mask set, which has a log-prob of {}; the run's are of {} .*_logprobs={}, or mask"
LIMIT = "rollout.max_new_tokens is 24"
REFUSED = {
    adds: f"returned token 1 at place 13 of 14 {MASK}",
    changes: rf"returned token \d+ at place 10 of 13 {MASK}",
    trains_the_prompt: "at place 8 of 13 with its loss mask set: that is the prompt; mask it",
    other_logprobs: "at place 12 of 13 with log-prob .*; the engine drew it with .*: give that, or",
    hotter: "at place 9 of 13 .* drawn at temperature 2.0; the run trains at 1.0: mask it",
    without_logprobs: f"at place 9 of 13 {MASK}",
    other_kind: KIND.format(*KINDS[::-1], False),
    goes_on: "which was drawn where stop tokens were forbidden .min_new_tokens.: mask it",
    cuts: "drawn with top_k=1, top_p=1.0, min_p=0.0, the run trains the full softmax .*: mask it,",
    has_thresholds: "a sample with thresholds, which the run finds: leave it out",
    has_advantages: "a sample with advantages, which the run finds: leave it out",
    has_returns: "a sample with returns, which the run finds: leave it out",
    has_a_teacher: "a sample with teacher_top, which the run finds: leave it out",
    other_prompt: "a sample that does not begin with request.prompt_ids",
    other_id: "a sample with the id 0x3; give request.sample_id",
    too_long: f"returned 25 tokens after the prompt; {LIMIT}",
    text_instead: "returned '19'; return a samebit.trainer.types:Sample",
    full: f"draws turn 2 after the context is full: it has 24 tokens after the prompt, and {LIMIT}",
    nearly_full: "turn 2 with max_new_tokens=24; its context has 4 tokens .*, and "
    f"{LIMIT}: give at most 20",
    adds_too_much: r"adds 25 tokens where there is room for 24 of 24 \(rollout.max_new_tokens\)",
    adds_a_text: "what Conversation.add is given is '12'; it must be a list of token ids; request",
    adds_a_fraction: "ValueError: a token of Conversation.add is 1.5; it must be an integer",
    adds_no_token: "token -1 at place 13 of 14, which is outside the vocabulary .0, 12.",
    without_the_prompt: "draws after a context that does not begin with request.prompt_ids",
    races: "draws a turn while another one is being drawn.*; await one before the next",
    leaves_a_turn: "returned while a turn was being drawn; await every turn",
    several: "draws turn 1 with n=2; give n=1",
    raises: "raised KeyError: 'tool' .SAMEBIT_TRACEBACK=1 shows where.",
    exits: "raised SystemExit: 3",
    cancels: "raised CancelledError",
}
WHERE = "^rollout.generate 'mine:current' on d, line 4: problem 3, sample 0x10, "


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_what_the_engine_did_not_draw_is_refused(small, text, function):
    """By function, problem, sample and token; the engine goes on."""
    with pytest.raises(GenerateError, match=WHERE + ".*" + REFUSED[function]):
        drawn(function, small, requests(text))
    assert small.generate([[1, 2]], replace(PARAMS, max_new_tokens=1))


def test_a_function_that_hangs_is_named(small, text):
    late = WHERE + "took longer than 0.2 s .rollout.generate_time"
    with pytest.raises(GenerateError, match=late):
        drawn(hangs, small, requests(text, 2), timeout_s=0.2)


def test_what_progress_raises_ends_all(small, text, monkeypatch):
    """One that does not end when it is told to is left behind."""
    monkeypatch.setattr(generation, "_CANCEL_S", 0.01)

    class Stop(Exception):
        pass

    def progress(done, tokens):
        raise Stop

    sys.modules["mine"].current, sys.modules["mine"].stubborn = hangs, True
    loaded = GenerateFunction(RolloutSection(generate="mine:current"), VOCAB)
    with pytest.raises(Stop):
        loaded.draw(small, requests(text, 3), PARAMS, progress)
    loaded.close()
