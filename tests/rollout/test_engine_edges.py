"""The engine at its limits: the first and last token that may be, and the exact longest context."""

import pytest
from helpers import make_prompts, outcomes

from samebit.rollout.types import SamplingParams

VOCAB = 331
PROMPTS = make_prompts(5, 21)


def sampled(engine, n=1, **settings):
    """n completions of the first prompt."""
    settings = {"max_new_tokens": 12, "ignore_eos": True, **settings}
    return engine.generate(PROMPTS[:1], SamplingParams(n=n, **settings))[0]


# -- what may be drawn -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {"stop_token_ids": [9], "min_new_tokens": 12}],
    ids=str,
)
def test_logprobs_of_restricted_draws_are_after_temperature(engine, limits):
    """Those of the full softmax, as score gives them; beside a neighbour of another temperature."""
    params = [
        SamplingParams(max_new_tokens=6, min_new_tokens=0, ignore_eos=True, temperature=3.0),
        SamplingParams(**{"max_new_tokens": 12, "temperature": 0.6, "ignore_eos": True, **limits}),
    ]
    groups = engine.generate(PROMPTS, params)
    for prompt, [c], temperature in zip(PROMPTS, groups, (3.0, 0.6), strict=True):
        [scores] = engine.score([[*prompt, *c.token_ids]], temperature)
        assert tuple(scores[len(prompt) - 1 :]) == c.logprobs


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-30}], ids=str)
def test_the_narrowest_limits_leave_the_likeliest_token(engine, limit):
    [greedy] = sampled(engine, temperature=0.0)
    for c in sampled(engine, n=3, **limit):
        assert (c.token_ids, c.logprobs) == (greedy.token_ids, greedy.logprobs)


@pytest.mark.parametrize("least", [0, 1, 2, 6])
def test_the_first_token_that_may_end(engine, least):
    """Nearly every token is a stop token: it comes as soon as it may, and no sooner."""
    going_on = {3, 7}
    stops = sorted(set(range(VOCAB)) - going_on)
    group = sampled(engine, n=4, stop_token_ids=stops, min_new_tokens=least)
    for c in group:
        assert set(c.token_ids[:least]) <= going_on
        assert c.token_ids[least] not in going_on
        assert (len(c.token_ids), c.finish_reason) == (least + 1, "stop")
    assert len({c.token_ids for c in group}) > 1


def test_no_token_may_end_where_all_are_asked_for(engine):
    stops = range(2, VOCAB)
    group = sampled(engine, n=3, stop_token_ids=stops, min_new_tokens=5, max_new_tokens=5)
    assert [(len(c.token_ids), c.finish_reason) for c in group] == [(5, "length")] * 3
    assert {token for c in group for token in c.token_ids} <= {0, 1}


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("which", [0, 2])
def test_a_stop_token_as_the_last_that_fits_is_a_stop(engine, length, which):
    """Samples of one prompt, of which one alone draws it there: the first, or one that forks."""
    settings = {"max_new_tokens": length, "temperature": 5.0}
    free = sampled(engine, n=3, **settings)
    last = free[which].token_ids[-1]
    assert [c.token_ids.count(last) for c in free] == [i == which for i in range(3)]
    group = sampled(engine, n=3, stop_token_ids=[last], **settings)
    assert outcomes([group]) == outcomes([free])
    assert [c.finish_reason == "stop" for c in group] == [i == which for i in range(3)]
    assert {c.finish_reason for c in group} == {"stop", "length"}


# -- the longest context ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"max_model_len": 50}, 50),
        ({"max_model_len": 48, "page_size": 16, "kv_cache_tokens": 48}, 48),
        ({"kv_cache_tokens": 63, "page_size": 16}, 48),  # whole pages
        ({"max_model_len": 1024, "prefill_chunk": 500}, 1024),  # the model's
    ],
    ids=str,
)
def test_a_context_may_be_as_long_as_the_limit(make_engine, engine, settings, length):
    """To the last position and page, with the bits of an engine that has room; and no longer."""
    small = make_engine(**settings)
    prompt = [i % VOCAB for i in range(length - 4)]
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    [[found]] = small.generate([prompt], params)
    if length < 1024:
        assert outcomes([[found]]) == outcomes(engine.generate([prompt], params))
    whole = [*prompt, *found.token_ids]
    assert tuple(small.score([whole])[0][-4:]) == found.logprobs
    for call in (
        lambda: small.generate([[*prompt, 1]], params),
        lambda: small.score([[*whole, 1]]),
    ):
        with pytest.raises(ValueError, match=f"exceed the .* of {length} tokens"):
            call()


def test_a_context_longer_than_the_models_is_refused(make_engine):
    with pytest.raises(ValueError, match="max_model_len is 1025; the model has 1024 positions"):
        make_engine(max_model_len=1025)


def test_the_smallest_engine(make_engine, engine):
    """Every setting at its least: one sequence, one token a step, one page."""
    small = make_engine(
        page_size=1, max_batch_tokens=1, max_num_seqs=1, prefill_chunk=1, kv_cache_tokens=7,
        max_model_len=7,
    )  # fmt: skip
    params = SamplingParams(n=2, max_new_tokens=2, ignore_eos=True)
    assert outcomes(small.generate(PROMPTS[:1], params)) == outcomes(
        engine.generate(PROMPTS[:1], params)
    )
    assert small.score(PROMPTS[:1], 0.5) == engine.score(PROMPTS[:1], 0.5)


def test_the_largest_values_are_accepted(make_engine, engine):
    """Seeds and ids of 64 bits."""
    largest = (1 << 64) - 1
    params = [SamplingParams(max_new_tokens=5, seed=seed) for seed in (None, largest)]
    [[a]] = make_engine(seed=largest).generate(PROMPTS[:1], params[0], [[largest]])
    [[b]] = engine.generate(PROMPTS[:1], params[1], [[largest]])
    assert (a.sample_id, a.token_ids, a.logprobs) == (b.sample_id, b.token_ids, b.logprobs)
    assert SamplingParams(min_new_tokens=128).min_new_tokens == 128


# -- requests that leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_an_abort_gives_every_sample_as_it_is(make_engine, engine, overlap):
    """In the samples' order: those that ended, those that run, and those that never began."""
    stops = range(0, VOCAB, 9)
    params = SamplingParams(n=6, max_new_tokens=20, ignore_eos=True, stop_token_ids=stops)
    [whole] = engine.generate(PROMPTS[1:], params)
    small = make_engine(max_num_seqs=2, overlap=overlap)
    request = small.add_request(PROMPTS[1], params, list(range(6)))
    waiting = small.add_request(PROMPTS[0], SamplingParams(n=2, max_new_tokens=3))
    for _ in range(4):
        assert small.step() == []
    nothing = small.abort_request(waiting)
    assert [(c.token_ids, c.finish_reason, c.version_spans) for c in nothing] == [
        ((), "abort", ())
    ] * 2
    part = small.abort_request(request)
    assert [c.sample_id for c in part] == list(range(6))
    for c, truth in zip(part, whole, strict=True):
        assert c.token_ids == truth.token_ids[: len(c.token_ids)]
        assert c.logprobs == truth.logprobs[: len(c.token_ids)]
        ended = len(c.token_ids) == len(truth.token_ids)
        assert c.finish_reason == (truth.finish_reason if ended else "abort")
    assert {c.finish_reason for c in part} == {"stop", "abort"}
    assert not small.has_unfinished_requests
    assert small.scheduler.num_running == 0
