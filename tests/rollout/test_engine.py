"""What is drawn: orders, sample ids, seeds, stopping and the sampling parameters."""

import pytest
import torch
from helpers import make_prompts, outcomes

from samebit.rollout.types import SamplingParams

VOCAB = 331
EOS = 0
PROMPTS = make_prompts(5, 70, 1, 33)
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)


def drawn(engine, **changes):
    """One completion of the first prompt."""
    settings = {"max_new_tokens": 12, "ignore_eos": True, **changes}
    [[completion]] = engine.generate(PROMPTS[:1], SamplingParams(**settings))
    return completion


# -- order, ids and seeds --------------------------------------------------------------------------


def test_outputs_are_in_input_order(engine):
    """However the lengths differ, and so the finishing order."""
    lens = (20, 3, 11, 1)
    params = [SamplingParams(n=2, max_new_tokens=n, ignore_eos=True) for n in lens]
    groups = engine.generate(PROMPTS, params)
    assert [[len(c.token_ids) for c in group] for group in groups] == [[n, n] for n in lens]
    for i, group in enumerate(groups):
        [alone] = engine.generate([PROMPTS[i]], [params[i]], [[2 * i, 2 * i + 1]])
        assert outcomes([alone]) == outcomes([group])


def test_samples_are_in_the_order_of_their_ids(engine):
    params = SamplingParams(n=4, max_new_tokens=6, ignore_eos=True)
    ids = [[40, 3, 1 << 40, 7]]
    [group] = engine.generate(PROMPTS[:1], params, ids)
    assert [c.sample_id for c in group] == ids[0]
    [back] = engine.generate(PROMPTS[:1], params, [ids[0][::-1]])
    assert outcomes([back[::-1]]) == outcomes([group])
    assert len({c.token_ids for c in group}) == 4


def test_default_ids_are_the_running_index_and_repeat_themselves(engine):
    params = SamplingParams(n=3, max_new_tokens=6, ignore_eos=True)
    first = engine.generate(PROMPTS, params)
    assert [[c.sample_id for c in g] for g in first] == [
        [3 * i, 3 * i + 1, 3 * i + 2] for i in range(4)
    ]
    assert outcomes(engine.generate(PROMPTS, params)) == outcomes(first)
    ids = [[c.sample_id for c in g] for g in first]
    assert outcomes(engine.generate(PROMPTS, params, ids)) == outcomes(first)


def test_all_64_bits_of_a_sample_id_matter(engine):
    ids = [[0, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 63) + (1 << 32), (1 << 64) - 1]]
    params = SamplingParams(n=7, max_new_tokens=8, ignore_eos=True)
    [group] = engine.generate(PROMPTS[:1], params, ids)
    assert len({c.token_ids for c in group}) == 7
    assert [c.sample_id for c in group] == ids[0]


def test_a_request_seed_overrides_the_engine_seed(make_engine, engine):
    other = make_engine(seed=5)
    assert drawn(other).token_ids != drawn(engine).token_ids
    assert drawn(other).token_ids == drawn(engine, seed=5).token_ids
    assert drawn(other, seed=0).token_ids == drawn(engine).token_ids
    large = [drawn(engine, seed=s).token_ids for s in (1 << 32, 1 << 63, (1 << 64) - 1)]
    assert len(set(large)) == 3


def test_another_token_in_the_prompt_changes_the_draw(engine):
    """The context is part of the function: a stale cache would show here."""
    prompt = PROMPTS[1]
    altered = [(prompt[0] + 1) % VOCAB, *prompt[1:]]
    a, b = engine.generate([prompt, altered], PARAMS, [[5], [6]])
    [same] = engine.generate([altered], PARAMS, [[5]])
    assert same[0].logprobs != a[0].logprobs
    assert same[0].logprobs != b[0].logprobs


def test_no_prompts_no_completions(engine):
    assert engine.generate([]) == []
    assert engine.score([]) == []


# -- stopping --------------------------------------------------------------------------------------


def test_a_stop_token_ends_and_is_included(engine):
    free = drawn(engine)
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    stopped = drawn(engine, stop_token_ids=[7, stop])
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.logprobs == free.logprobs[: first + 1]
    assert (stopped.finish_reason, free.finish_reason) == ("stop", "length")


def test_eos_ends_unless_ignored(engine):
    """Sampled until an end-of-sequence token was drawn by chance."""
    params = SamplingParams(n=40, temperature=3.0, max_new_tokens=60)
    [group] = engine.generate(PROMPTS[:1], params)
    stopped = [c for c in group if c.finish_reason == "stop"]
    assert stopped
    assert len(stopped) < 40
    for c in stopped:
        assert c.token_ids.index(EOS) == len(c.token_ids) - 1
    for c in group:
        if c.finish_reason == "length":
            assert len(c.token_ids) == 60
            assert EOS not in c.token_ids
    ignoring = SamplingParams(n=40, temperature=3.0, max_new_tokens=60, ignore_eos=True)
    [free] = engine.generate(PROMPTS[:1], ignoring)
    assert all(c.finish_reason == "length" for c in free)
    for with_eos, without in zip(group, free, strict=True):
        assert without.token_ids[: len(with_eos.token_ids)] == with_eos.token_ids


def test_no_stop_token_before_min_new_tokens(engine):
    """The stop token is not drawn early; the log-prob stays that of the full softmax."""
    stop = drawn(engine).token_ids[0]
    held = drawn(engine, stop_token_ids=[stop], min_new_tokens=6)
    assert stop not in held.token_ids[:5]
    assert len(held.token_ids) >= 6
    context = [*PROMPTS[0], *held.token_ids]
    [scores] = engine.score([context])
    assert tuple(scores[len(PROMPTS[0]) - 1 :]) == held.logprobs


def test_length_one(engine):
    one = drawn(engine, max_new_tokens=1)
    assert one.token_ids == drawn(engine).token_ids[:1]
    assert one.finish_reason == "length"


# -- sampling parameters ---------------------------------------------------------------------------


def test_logprobs_false_returns_none_and_draws_the_same(engine):
    quiet = drawn(engine, logprobs=False)
    assert quiet.logprobs == ()
    assert quiet.token_ids == drawn(engine).token_ids


def test_greedy_is_the_limit_of_top_k_one(engine):
    greedy = drawn(engine, temperature=0.0)
    assert greedy.token_ids == drawn(engine, top_k=1).token_ids
    assert greedy.logprobs == drawn(engine, top_k=1).logprobs
    assert drawn(engine, temperature=0.0, seed=9).token_ids == greedy.token_ids


def test_logprobs_are_of_the_full_softmax_after_temperature(engine):
    """Not renormalised by top-k, top-p or min-p."""
    for limits in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0.6}):
        completion = drawn(engine, **limits)
        context = [*PROMPTS[0], *completion.token_ids]
        [scores] = engine.score([context], limits.get("temperature", 1.0))
        assert tuple(scores[len(PROMPTS[0]) - 1 :]) == completion.logprobs


def softmax_of(engine, prompt, temperature=1.0):
    """The next token's distribution: one score per token of the vocabulary."""
    scores = engine.score([[*prompt, t] for t in range(VOCAB)], temperature)
    return torch.tensor([s[-1] for s in scores], dtype=torch.float64).exp()


def chi_square_p(counts, probs):
    """p-value of Pearson's test, rare tokens taken together."""
    expected = probs * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    ideal = torch.cat([expected[~rare], expected[rare].sum().clamp(min=1e-9)[None]])
    statistic = ((observed - ideal).square() / ideal).sum()
    return torch.special.gammaincc(torch.tensor((len(ideal) - 1) / 2).double(), statistic / 2)


@pytest.mark.parametrize(
    "limits", [{}, {"temperature": 0.6}, {"top_k": 9}, {"top_p": 0.7}, {"min_p": 0.05}], ids=str
)
def test_first_tokens_follow_the_softmax(engine, limits):
    """Chi-square of 6,000 samples' first tokens; nothing outside the allowed set."""
    probs = softmax_of(engine, PROMPTS[0], limits.get("temperature", 1.0))
    assert abs(probs.sum().item() - 1) < 1e-5
    order = probs.argsort(descending=True)
    allowed = torch.ones(VOCAB, dtype=torch.bool)
    if "top_k" in limits:
        allowed[order[9:]] = False
    if "top_p" in limits:
        allowed[order[probs[order].cumsum(0) - probs[order] >= 0.7]] = False
    if "min_p" in limits:
        allowed = probs >= 0.05 * probs.max()
    params = SamplingParams(n=6000, max_new_tokens=1, ignore_eos=True, **limits)
    [group] = engine.generate(PROMPTS[:1], params)
    tokens = torch.tensor([c.token_ids[0] for c in group])
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    assert not counts[~allowed].any()
    probs = probs.masked_fill(~allowed, 0.0)
    assert chi_square_p(counts, probs / probs.sum()) > 1e-3


def test_later_positions_draw_anew(engine):
    """Noise keyed by the position: the same context shape does not repeat the same token."""
    params = SamplingParams(n=200, temperature=50.0, max_new_tokens=2, ignore_eos=True)
    [group] = engine.generate(PROMPTS[:1], params)
    assert sum(c.token_ids[0] == c.token_ids[1] for c in group) < 10
