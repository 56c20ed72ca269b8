"""Scores, hidden states, versions; and requests that come, go and share the engine."""

import asyncio
import itertools
import math

import pytest
from helpers import assert_same_bits, make_prompts, outcomes

from samebit.rollout.runtime.sampler import NonFiniteError
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import VersionSpan

PROMPTS = make_prompts(5, 70, 1, 33)
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)


def drawn(engine, **changes):
    """One completion of the first prompt."""
    settings = {"max_new_tokens": 12, "ignore_eos": True, **changes}
    [[completion]] = engine.generate(PROMPTS[:1], SamplingParams(**settings))
    return completion


# -- score, hidden states, versions ----------------------------------------------------------------


def test_score_is_generate_backwards(engine):
    groups = engine.generate(PROMPTS, PARAMS)
    contexts = [[*p, *c.token_ids] for p, [c] in zip(PROMPTS, groups, strict=True)]
    for prompt, [c], values in zip(PROMPTS, groups, engine.score(contexts), strict=True):
        assert len(values) == len(prompt) + len(c.token_ids) - 1
        assert tuple(values[len(prompt) - 1 :]) == c.logprobs
        assert all(math.isfinite(v) and v <= 0 for v in values)


def test_score_does_not_depend_on_company_or_chunks(make_engine, engine):
    sequences = make_prompts(2, 64, 65, 130, seed=3)
    together = engine.score(sequences)
    assert [engine.score([s])[0] for s in sequences] == together
    small = make_engine(prefill_chunk=13, max_batch_tokens=29, page_size=16)
    assert small.score(sequences) == together
    assert small.score(sequences) == together  # prefix hits are no use to a score


@pytest.mark.parametrize("overlap", [False, True])
def test_a_nan_score_names_its_token(make_engine, overlap):
    """The first one behind a damaged token, here that of a later chunk; nothing stays behind."""
    engine = make_engine(prefill_chunk=4, overlap=overlap)
    engine.weights["embedding.word_embeddings.weight"][17] = math.nan
    with pytest.raises(NonFiniteError, match="NaN log-prob in request 0, sample 0, at position 9"):
        engine.score([[5, 6, 7, 8, 9, 10, 11, 12, 17, 5, 6]])
    assert not engine.has_unfinished_requests


@pytest.fixture(scope="module")
def with_hidden(engine):
    """Samples with hidden states, alone."""
    return [
        engine.generate([p], PARAMS, [[i]], return_hidden_states=[0, 2, 3])[0][0]
        for i, p in enumerate(PROMPTS)
    ]


def test_hidden_states_have_a_row_for_every_context(with_hidden):
    for prompt, c in zip(PROMPTS, with_hidden, strict=True):
        assert set(c.hidden_states) == {0, 2, 3}
        for states in c.hidden_states.values():
            assert states.shape == (len(prompt) + len(c.token_ids) - 1, 48)


@pytest.mark.parametrize(
    "settings",
    [{}, {"prefill_chunk": 7, "max_batch_tokens": 20}, {"page_size": 16, "kv_cache_tokens": 112}],
    ids=str,
)
def test_hidden_states_do_not_depend_on_company(make_engine, with_hidden, settings):
    """Chunks, neighbours, preemption; and a warm prefix cache."""
    engine = make_engine(**settings)
    for _ in range(2):
        groups = engine.generate(PROMPTS, PARAMS, return_hidden_states=[0, 2, 3])
        for [found], expected in zip(groups, with_hidden, strict=True):
            assert outcomes([[found]]) == outcomes([[expected]])
            for layer, states in expected.hidden_states.items():
                assert_same_bits(found.hidden_states[layer], states, layer)


def test_hidden_states_of_samples_share_the_prompt(engine, with_hidden):
    params = SamplingParams(n=3, max_new_tokens=12, ignore_eos=True)
    [group] = engine.generate(PROMPTS[1:2], params, [[1, 50, 51]], return_hidden_states=[2])
    assert_same_bits(group[0].hidden_states[2], with_hidden[1].hidden_states[2])
    for c in group:
        assert c.hidden_states[2].shape == (70 + 12 - 1, 48)
        assert_same_bits(c.hidden_states[2][:70], group[0].hidden_states[2][:70])


def test_version_spans_name_the_weights(make_engine):
    engine = make_engine()
    before = engine.weight_version
    assert drawn(engine).version_spans == (VersionSpan(0, before),)
    halved = {name: p * 0.5 for name, p in engine.weights.items()}
    after = engine.copy_weights(halved, step=9)
    assert (after.step, engine.weight_version) == (9, after)
    assert after.digest != before.digest
    assert drawn(engine).version_spans == (VersionSpan(0, after),)


def test_new_weights_are_served_and_old_prefixes_forgotten(make_engine):
    """As a fresh engine on the new weights would; back again gives the first bits."""
    engine = make_engine(page_size=16)
    first = outcomes(engine.generate(PROMPTS, PARAMS))
    original = {name: p.clone() for name, p in engine.weights.items()}
    doubled = {name: p * 1.5 for name, p in original.items()}
    engine.copy_weights(doubled, step=1)
    fresh = make_engine(page_size=16)
    fresh.copy_weights(doubled, step=1)
    second = outcomes(engine.generate(PROMPTS, PARAMS))
    assert second == outcomes(fresh.generate(PROMPTS, PARAMS)) != first
    engine.copy_weights(original, step=2)
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == first


# -- progress, steps, aborts, asyncio --------------------------------------------------------------


def test_progress_counts_up_to_the_end(engine):
    params = SamplingParams(n=2, max_new_tokens=5, ignore_eos=True)
    for _ in range(2):  # of this call, not of the engine's life
        seen = []
        engine.generate(PROMPTS, params, progress=lambda *now: seen.append(now))  # noqa: B023
        assert seen == sorted(seen)
        assert seen[-1] == (8, 40)
        assert len(seen) == 5


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("step", [1, 9, 10, 11, 12])
def test_an_error_in_progress_leaves_the_engine_clean(make_engine, step, overlap):
    """Also where a step in flight ends some of the requests that are given up."""
    engine = make_engine(prefix_cache=False, overlap=overlap)
    steps = itertools.count(1)

    def interrupt(done, tokens):
        if next(steps) == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, PARAMS, progress=interrupt)
    assert not engine.has_unfinished_requests
    assert engine.pool.num_free == engine.pool.num_pages
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == outcomes(
        make_engine().generate(PROMPTS, PARAMS)
    )


def run_to_end(engine):
    """Completions by request id."""
    found = {}
    while engine.has_unfinished_requests:
        for group in engine.step():
            found[group[0].request_id] = group
    return found


def test_requests_join_and_leave_while_others_run(make_engine, engine):
    """add_request, step and abort_request; the bits are generate's."""
    truth = outcomes(engine.generate(PROMPTS, PARAMS))
    stepped = make_engine(prefix_cache=False)
    assert stepped.step() == []
    ids = [stepped.add_request(PROMPTS[0], PARAMS, [0])]
    stepped.step()
    ids.append(stepped.add_request(PROMPTS[1], PARAMS, [1]))
    doomed = stepped.add_request(PROMPTS[1], SamplingParams(n=3, max_new_tokens=50))
    stepped.step()
    ids += [stepped.add_request(PROMPTS[i], PARAMS, [i]) for i in (2, 3)]
    aborted = stepped.abort_request(doomed)
    assert [c.finish_reason for c in aborted] == ["abort"] * 3
    assert [len(c.token_ids) for c in aborted] == [1, 1, 1]
    found = run_to_end(stepped)
    assert outcomes([found[i] for i in ids]) == truth
    assert doomed not in found
    assert stepped.pool.num_free == stepped.pool.num_pages


def test_an_aborted_sample_is_a_prefix_of_the_whole(make_engine, engine):
    [whole] = engine.generate(PROMPTS[:1], PARAMS)
    stepped = make_engine()
    request = stepped.add_request(PROMPTS[0], PARAMS, [0])
    for _ in range(4):
        stepped.step()
    [part] = stepped.abort_request(request)
    assert part.token_ids == whole[0].token_ids[:4]
    assert part.logprobs == whole[0].logprobs[:4]
    with pytest.raises(KeyError, match=f"no unfinished request '{request}'"):
        stepped.abort_request(request)


def test_generate_does_not_swallow_other_requests(make_engine, engine):
    """A request of add_request that finishes during generate is still step's to report."""
    truth = outcomes(engine.generate(PROMPTS[:1], PARAMS))
    mixed = make_engine()
    request = mixed.add_request(PROMPTS[0], PARAMS, [0])
    mixed.generate(PROMPTS[1:], SamplingParams(max_new_tokens=30, ignore_eos=True))
    assert outcomes([run_to_end(mixed)[request]]) == truth


def test_concurrent_callers_get_their_own(make_engine, engine):
    truth = outcomes(engine.generate(PROMPTS, PARAMS))
    shared = make_engine()

    async def together():
        calls = [shared.agenerate([p], PARAMS, [[i]]) for i, p in enumerate(PROMPTS)]
        return await asyncio.gather(*calls)

    assert outcomes([group for [group] in asyncio.run(together())]) == truth
    assert not shared.has_unfinished_requests
