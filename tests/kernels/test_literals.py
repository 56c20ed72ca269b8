"""Noise and draws as literal values, computed once by the slow program of
tests/rollout/test_draw_reference.py: a change of all sides at once is seen on any machine."""

import math

import pytest
import torch

from samebit.kernels.contract import LSE_SEGMENTS, VOCAB_MULTIPLE, padded_vocab_size, tree_sum
from samebit.kernels.logprob import logprob, logprob_of
from samebit.kernels.rms_norm import rms_norm
from samebit.kernels.sample import allowed_tokens, draw, draw_with_logprobs, gumbel_noise

LOGITS = torch.tensor([((37 * i * i) % 101) / 25 for i in range(331)])


def int64(*values):
    """A tensor of integers in [0, 2^64), as int64 holds them."""
    return torch.tensor([v - (1 << 64) if v >> 63 else v for v in values])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ((0, 0, 0), [0.674840, -0.753587, -0.285719, 0.072474, -1.276536, 0.799486]),
        ((7, 1, 2), [0.174296, 0.982671, 0.235720, 1.155107, 0.058069, 1.000200]),
        (
            ((1 << 64) - 1, 100_000, (5 << 32) + 3),
            [1.141530, 1.786743, 0.180636, -0.719028, 0.601702, 0.020880],
        ),
    ],
)
def test_noise(key, expected):
    """Of (seed, position, sample id), for the first six tokens."""
    found = gumbel_noise(*(int64(value) for value in key), 6)
    assert found[0].tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("temperature", "tokens", "logprobs"),
    [
        (1.0, [63, 36, 235, 280, 296], [-4.451310, -5.331310, -4.651310, -5.251310, -4.611310]),
        (0.5, [63, 36, 235, 280, 296], [-3.819509, -5.579509, -4.219509, -5.419509, -4.139509]),
        (4.0, [45, 36, 235, 280, 200], [-5.510236, -5.570236, -5.400236, -5.550236, -5.880236]),
    ],
)
def test_draws(temperature, tokens, logprobs):
    """At positions 40 to 44, under two sample ids above 2^32."""
    rows = LOGITS.expand(5, -1)
    positions = torch.arange(40, 45)
    keys = int64(*[(3 << 32) + 1] * 5), positions, (5 << 32) + positions % 2
    sampled = torch.zeros(5, dtype=torch.bool)
    found = draw_with_logprobs(rows, torch.full((5,), temperature), *keys, sampled)
    assert found[0].tolist() == tokens
    assert found[1].tolist() == pytest.approx(logprobs, abs=5e-6)
    assert draw(rows / temperature, *keys, sampled).tolist() == tokens
    best = draw_with_logprobs(rows, torch.full((5,), temperature), *keys, ~sampled)
    assert set(best[0].tolist()) == {int(LOGITS.argmax())}


# Probabilities of 5 tokens: 0.4, 0.2, 0.2, 0.15, 0.05. A share that is met exactly is in no case
# the matter: fp32 would decide.
SHARES = [0.2, 0.15, 0.4, 0.2, 0.05]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (0, 1.0, 0.0, {0, 1, 2, 3, 4}),
        (1, 1.0, 0.0, {2}),
        (2, 1.0, 0.0, {0, 2, 3}),  # the second ties with the third
        (3, 1.0, 0.0, {0, 2, 3}),
        (4, 1.0, 0.0, {0, 1, 2, 3}),
        (0, 0.39, 0.0, {2}),
        (0, 0.41, 0.0, {0, 2, 3}),
        (0, 0.79, 0.0, {0, 2, 3}),
        (0, 0.81, 0.0, {0, 1, 2, 3}),
        (0, 0.96, 0.0, {0, 1, 2, 3, 4}),
        (0, 1.0, 0.49, {0, 2, 3}),
        (0, 1.0, 0.51, {2}),
        (0, 1.0, 0.37, {0, 1, 2, 3}),
        (0, 1.0, 0.12, {0, 1, 2, 3, 4}),
        (2, 0.51, 0.0, {0, 2, 3}),  # 0.4 of the 0.8 that are left
        (2, 0.49, 0.0, {2}),
        (0, 0.51, 0.45, {0, 2, 3}),
        (0, 0.49, 0.45, {2}),
        (4, 0.85, 0.4, {0, 2, 3}),
    ],
)
def test_limits(top_k, top_p, min_p, kept):
    """Ties with a threshold are kept; top-p counts in what the others leave."""
    limits = torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p])
    found = allowed_tokens(torch.tensor([SHARES]).log(), *limits)
    assert set(found[0].nonzero().flatten().tolist()) == kept


def test_eps_is_added_to_the_mean_square():
    """By hand: a mean square of 1e-6 and an eps of 3e-6 make a root of 2e-3."""
    x = torch.tensor([[1e-3, -1e-3, 1e-3, 1e-3]])
    found = rms_norm(x, torch.tensor([1.0, 2.0, 3.0, 4.0]), 3e-6)
    assert found[0].tolist() == pytest.approx([0.5, -1.0, 1.5, 2.0], rel=1e-5)


def test_segments_are_summed_as_a_tree_of_neighbours():
    """2^24 + 1 is no fp32 number, so each order has its own sum; ranks share this one."""
    parts = [torch.tensor(x) for x in (2.0**24, 1.0, -(2.0**24), 1.0)]
    assert float(tree_sum(parts)) == 1.0
    assert float(tree_sum([*parts[2:], *parts[:2]])) == 1.0
    assert float(tree_sum([parts[0], parts[2], parts[1], parts[3]])) == 2.0


def test_rows_beyond_one_chunk_of_logits():
    """Log-probs, entropies and gradients of 700 rows, which two chunks hold, are those of fp64."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (700, 8192))
    ids = torch.randint(8192, (700,), generator=generator)
    temperature = torch.linspace(0.5, 2, 700)
    grad = torch.randn(700, generator=generator)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    logprobs, entropies = logprob(*leaves, ids, temperature, 8192)
    found = [logprobs, entropies, *torch.autograd.grad(logprobs, leaves, grad)]
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    exact = (leaves[0] @ leaves[1].t() / temperature.double()[:, None]).log_softmax(-1)
    chosen = exact.gather(1, ids[:, None]).squeeze(1)
    gradients = torch.autograd.grad(chosen, leaves, grad.double(), retain_graph=True)
    wanted = [chosen, -(exact.exp() * exact).sum(-1), *gradients]
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=2e-5)


def test_the_vocabulary_is_cut_into_eight_segments_of_its_padded_size():
    """What tensor parallel ranks share: the sum over segments is part of the contract."""
    assert (VOCAB_MULTIPLE, LSE_SEGMENTS) == (1024, 8)
    sizes = {1: 1024, 1024: 1024, 1025: 2048, 151_936: 152_576}
    assert {size: padded_vocab_size(size) for size in sizes} == sizes


def test_log_probs_are_of_the_full_softmax_after_temperature():
    """By hand: four tokens of 4, 3, 2 and 1 parts in ten; at temperature 1/2 of their squares."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()
    ids = torch.tensor([1])
    assert float(logprob_of(logits, ids)) == pytest.approx(math.log(0.3), abs=1e-6)
    assert float(logprob_of(logits / 0.5, ids)) == pytest.approx(math.log(9 / 30), abs=1e-6)
    ids = torch.tensor([2])
    assert float(logprob_of(logits / 0.5, ids)) == pytest.approx(math.log(4 / 30), abs=1e-6)
