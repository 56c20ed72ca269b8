"""Log-probs of the distribution that draws, and the thresholds that say which it was."""

import asyncio
import itertools
from dataclasses import replace

import pytest
from callers import parts_of
from helpers import make_prompts

from samebit.rollout.types import SamplingParams

PROMPTS = make_prompts(5, 70, 1, 33)
FULL = SamplingParams(n=2, max_new_tokens=12, ignore_eos=True, temperature=0.8, top_p=0.9, top_k=40)
TRUNCATED = replace(FULL, truncated_logprobs=True)
IDS = [[2 * i, 2 * i + 1] for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def truth(engine):
    return engine.generate(PROMPTS, TRUNCATED, IDS)


def test_they_draw_the_same_tokens(engine, truth):
    """Each is more likely by what was cut off, which is the same for all of a kept set."""
    full = engine.generate(PROMPTS, FULL, IDS)
    for a, b in zip(itertools.chain(*full), itertools.chain(*truth), strict=True):
        assert a.token_ids == b.token_ids
        assert (a.thresholds, len(b.thresholds)) == ((), 12)
        assert all(x < y for x, y in zip(a.logprobs, b.logprobs, strict=True))


def test_the_only_token_is_certain(engine):
    params = replace(TRUNCATED, top_k=1, top_p=1.0)
    for group in engine.generate(PROMPTS, params, IDS):
        assert {x for c in group for x in c.logprobs} == {0.0}


def test_in_any_company(make_engine, truth):
    """Beside requests whose log-probs are full, with and without limits, or not told."""
    others = [replace(FULL, seed=1), SamplingParams(max_new_tokens=12), replace(TRUNCATED, n=1)]
    others += [replace(TRUNCATED, logprobs=False, seed=2)]
    params = [p for other in others for p in (TRUNCATED, other)]
    own = make_engine(page_size=16, kv_cache_tokens=144, overlap=True)
    prompts = [p for pair in zip(PROMPTS, reversed(PROMPTS), strict=True) for p in pair]
    ids = [[100 * i + j for j in range(p.n)] for i, p in enumerate(params)]
    ids[::2] = IDS
    groups = own.generate(prompts, params, ids)
    assert own.scheduler.num_preemptions > 0
    for found, expected in zip(groups[::2], truth, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert (a.token_ids, a.logprobs, a.thresholds) == (
                b.token_ids,
                b.logprobs,
                b.thresholds,
            )
    assert [len(c.thresholds) for group in groups[1::2] for c in group] == [0] * 3 + [12, 0, 0]


@pytest.mark.parametrize("settings", [{}, {"max_num_seqs": 3, "prefill_chunk": 7}], ids=str)
def test_increments_have_them(make_engine, truth, settings):
    parts = asyncio.run(parts_of(make_engine(**settings).stream(PROMPTS, TRUNCATED, IDS)))
    for completion in itertools.chain(*truth):
        increments = parts[completion.sample_id]
        assert all(len(p.thresholds) == len(p.token_ids) for p in increments)
        assert tuple(itertools.chain(*(p.thresholds for p in increments))) == completion.thresholds


def test_forbidden_stop_tokens_are_no_threshold():
    with pytest.raises(ValueError, match=r"min_new_tokens is 2; it must be 0 with truncated_logp"):
        replace(TRUNCATED, min_new_tokens=2)


def test_without_limits_they_are_the_full_ones(engine):
    params = [SamplingParams(max_new_tokens=4, truncated_logprobs=x) for x in (False, True)]
    full, truncated = (engine.generate(PROMPTS[:2], p, [[1], [2]]) for p in params)
    for [a], [b] in zip(full, truncated, strict=True):
        assert (a.logprobs, a.thresholds) == (b.logprobs, b.thresholds)
