"""Likeliest tokens of given sequences: the bits of their scores, in any company."""

import math

import pytest
import torch
from helpers import make_prompts

from samebit.kernels.top_tokens import TopTokens

CONTEXTS = make_prompts(5, 70, 2, 33)
K, T = 6, 0.7


def assert_same(found, expected):
    """To the bit: (log-probs, TopTokens) of sequences."""
    assert len(found) == len(expected)
    for (scores, top), (others, theirs) in zip(found, expected, strict=True):
        assert scores == others
        for name in ("token_ids", "logprobs", "rest"):
            assert torch.equal(getattr(top, name), getattr(theirs, name)), name


@pytest.fixture(scope="module")
def truth(engine):
    return engine.score_top(CONTEXTS, K, T)


def test_they_are_the_scores_of_the_likeliest(engine, truth):
    """A token's log-prob has the bits that it has if it is given; what is left out is less likely,
    and what it comes to together makes the sum 1."""
    assert [scores for scores, _ in truth] == engine.score(CONTEXTS, T)
    vocab_size = engine.model_config.vocab_size
    for context, (_, top) in zip(CONTEXTS, truth, strict=True):
        assert top.token_ids.shape == top.logprobs.shape == (len(context) - 1, K)
        total = top.logprobs.exp().sum(1) + top.rest.exp()
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
        place = len(context) // 2 - 1
        every = [[*context[: place + 1], token] for token in range(vocab_size)]
        scores = torch.tensor([found[-1] for found in engine.score(every, T)])
        chosen = top.token_ids[place].long()
        assert torch.equal(scores[chosen], top.logprobs[place])
        scores[chosen] = -math.inf
        assert scores.max() <= top.logprobs[place].min()


def test_of_all_tokens_none_is_left(engine):
    vocab_size = engine.model_config.vocab_size
    [(_, top)] = engine.score_top([[1, 2, 3]], vocab_size)
    assert top.token_ids.sort(1).values.tolist() == [list(range(vocab_size))] * 2
    assert top.rest.eq(-math.inf).all()


def test_in_any_company(make_engine, truth):
    """In chunks, preempted, and beside sequences that ask for more, for fewer and for none."""
    own = make_engine(page_size=16, kv_cache_tokens=112, prefill_chunk=9, max_batch_tokens=32)
    scoring, places = own.requests.scoring, slice(0, None, 4)
    each = zip(*(scoring(CONTEXTS, T, k) for k in (K, 9, 2, None)), strict=True)
    groups = own.loop.run([request for four in each for request in four], None)
    found = [(list(c.logprobs), c.top_tokens) for [c] in groups[places]]
    assert_same(found, truth)
    assert [c.top_tokens for [c] in groups[3::4]] == [None] * len(CONTEXTS)
    for [more], [fewer], (scores, top) in zip(groups[1::4], groups[2::4], truth, strict=True):
        assert isinstance(more.top_tokens, TopTokens)
        assert torch.equal(more.top_tokens.token_ids[:, :K], top.token_ids)
        assert torch.equal(fewer.top_tokens.logprobs, top.logprobs[:, :2])
        assert (fewer.top_tokens.rest > top.rest).all()
        assert list(fewer.logprobs) == scores


@pytest.mark.parametrize("k", [0, -1, 332, 1.5, None])
def test_a_number_of_tokens_that_cannot_be(engine, k):
    message = "score_top k is .*1.5|score_top k is (0|-1|332|None); it must be"
    with pytest.raises(ValueError, match=message):
        engine.score_top(CONTEXTS, k)
