"""The noise is Philox and the Gumbel formula to the letter; draws follow the right softmax."""

import math
import random

import pytest
import torch
from helpers import assert_same_bits, philox_on_integers

from samebit.kernels.cpu.sample import gumbel_from_bits, philox_4x32
from samebit.kernels.sample import (
    allowed_tokens,
    gumbel_noise,
    sample,
)

MAX_32 = (1 << 32) - 1
INF = float("inf")

# Known answers of the Random123 distribution (kat_vectors): counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def int64(*values):
    """A tensor of integers in [0, 2^64), as int64 holds them."""
    return torch.tensor([v - (1 << 64) if v >> 63 else v for v in values])


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, output):
    counter, key = (tuple(torch.tensor([w]) for w in words(x)) for x in (counter, key))
    assert [int(w) for w in philox_4x32(counter, key)] == words(output)


def test_philox_broadcasts_and_matches_integer_arithmetic():
    """int64 holds the 64-bit products only by wrapping round."""
    rng = random.Random(0)
    rows = [[rng.getrandbits(32) for _ in range(6)] for _ in range(200)]
    columns = [torch.tensor(c) for c in zip(*rows, strict=True)]
    found = torch.stack(philox_4x32(tuple(columns[:4]), tuple(columns[4:])), dim=1)
    assert found.tolist() == [list(philox_on_integers(r[:4], r[4:])) for r in rows]


def gumbel_exact(x):
    """g from the contract's v (rounded to fp32), the rest in fp64."""
    v = float(torch.tensor((x + 1) * 2.0**-32, dtype=torch.float64).float())
    return -INF if v == 1.0 else -math.log(-math.log1p(-v))


def test_gumbel_at_its_extremes():
    """Where a careless formula gives +inf, NaN or loses the tail."""
    largest = MAX_32 - 129  # x + 1 = 2^32 - 129 is the last that does not round to 2^32
    bits = [0, 1, 2, 1 << 31, (1 << 31) - 1, 1 << 24, largest - 256, largest - 1, largest]
    found = gumbel_from_bits(torch.tensor(bits))
    for x, g in zip(bits, found.tolist(), strict=True):
        exact = gumbel_exact(x)
        assert math.isfinite(exact)
        assert abs(g - exact) <= 4e-7 * max(1.0, abs(exact)), x
    assert abs(found[0].item() - 32 * math.log(2)) < 1e-5  # v = 2^-32: the largest noise of all
    rounded = gumbel_from_bits(torch.tensor([MAX_32, MAX_32 - 1, MAX_32 - 128]))
    assert rounded.tolist() == [-INF] * 3
    assert gumbel_exact(MAX_32 - 1) == -INF


def test_gumbel_is_never_nan_or_plus_infinity():
    dense = torch.cat([torch.arange(200_000), MAX_32 - torch.arange(200_000)])
    generator = torch.Generator().manual_seed(0)
    spread = torch.randint(1 << 32, (1_000_000,), generator=generator)
    noise = gumbel_from_bits(torch.cat([dense, spread]))
    assert not noise.isnan().any()
    assert noise.max().item() <= 32 * math.log(2) + 1e-5
    drawn = noise[400_000:]
    assert abs(drawn.mean().item() - 0.5772157) < 0.005
    assert abs(drawn.var().item() - math.pi**2 / 6) < 0.02


def test_noise_is_philox_of_its_key():
    """Which integer goes where: seed in the key; token, position and sample id in the counter."""
    cases = [
        (0, 0, 0),
        (7, 1, 2),
        ((1 << 64) - 1, 100_000, (1 << 64) - 1),
        ((5 << 32) + 1, 3, (9 << 32) + 4),
        (1 << 63, MAX_32, 1 << 63),
    ]
    seeds, positions, ids = zip(*cases, strict=True)
    found = gumbel_noise(int64(*seeds), int64(*positions), int64(*ids), 39)
    for row, (seed, position, sample_id) in enumerate(cases):
        key = (seed & MAX_32, seed >> 32)
        rest = (position, sample_id & MAX_32, sample_id >> 32)
        bits = torch.tensor([philox_on_integers((t // 4, *rest), key)[t % 4] for t in range(39)])
        assert_same_bits(found[row], gumbel_from_bits(bits), cases[row])
    found = gumbel_noise(int64(7), int64(1), int64(2), 40_000)[0, 32_760:32_776]  # in two parts
    bits = [philox_on_integers((t // 4, 1, 2, 0), (7, 0))[t % 4] for t in range(32_760, 32_776)]
    assert_same_bits(found, gumbel_from_bits(torch.tensor(bits)))


@pytest.mark.parametrize("vocab_size", [33, 100, 331, 1025, 70_000])
def test_noise_does_not_depend_on_the_batch(vocab_size):
    """Rows alone, in any number, in any order: a token's noise is a function of its key."""
    num_rows = 40 if vocab_size < 10_000 else 5
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randint(1 << 62, (num_rows,), generator=generator) for _ in range(3)]
    keys[1] %= 100_000
    full = gumbel_noise(*keys, vocab_size)
    for i in range(num_rows):
        assert_same_bits(gumbel_noise(*(k[i : i + 1] for k in keys), vocab_size)[0], full[i])
    for m in range(1, num_rows, 7):
        assert_same_bits(gumbel_noise(*(k[-m:] for k in keys), vocab_size), full[-m:])
    flipped = gumbel_noise(*(k.flip(0) for k in keys), vocab_size)
    assert_same_bits(flipped.flip(0), full)


def test_noise_does_not_depend_on_the_vocabulary():
    """Padding the vocabulary, or sharding it, leaves each token its own noise."""
    keys = int64(1, 2), int64(3, 4), int64(5, 6)
    large = gumbel_noise(*keys, 40_000)
    for vocab_size in (1, 7, 33, 1000, 32_767, 32_768, 32_769):
        assert_same_bits(gumbel_noise(*keys, vocab_size), large[:, :vocab_size].contiguous())


def test_every_bit_of_the_key_matters():
    """Sample ids above 2^32 and 2^63 are ids of their own, and so are seeds and positions."""
    rows = {(0, 0, 0)}
    rows |= {(1 << b, 0, 0) for b in range(64)} | {(0, 0, 1 << b) for b in range(64)}
    rows |= {(0, 1 << b, 0) for b in range(32)}
    seeds, positions, ids = zip(*sorted(rows), strict=True)
    noise = gumbel_noise(int64(*seeds), int64(*positions), int64(*ids), 8)
    assert len({tuple(row) for row in noise.tolist()}) == len(rows)


def chi_square_p(counts, probs):
    """p-value of Pearson's test; cells are merged until each expects at least 5."""
    expected = probs.double() * counts.sum()
    merged_counts, merged_expected, n, e = [], [], 0.0, 0.0
    for i in expected.argsort().tolist():
        n, e = n + counts[i].item(), e + expected[i].item()
        if e >= 5:
            merged_counts.append(n)
            merged_expected.append(e)
            n, e = 0.0, 0.0
    observed, ideal = torch.tensor(merged_counts).double(), torch.tensor(merged_expected).double()
    statistic = ((observed - ideal).square() / ideal).sum()
    freedom = torch.tensor((len(observed) - 1) / 2).double()
    return torch.special.gammaincc(freedom, statistic / 2).item()


def draws(logits, candidates, varied, num_draws):
    """Tokens drawn while one part of the key runs and the others stand still."""
    counts = torch.zeros(len(logits))
    fixed = torch.full((4096,), 12)
    for start in range(0, num_draws, 4096):
        running = torch.arange(start, start + 4096)
        keys = [running if name == varied else fixed for name in ("seed", "position", "id")]
        ids = sample(candidates.expand(4096, -1), gumbel_noise(*keys, len(logits)))
        counts += torch.bincount(ids, minlength=len(logits))
    return counts


@pytest.mark.parametrize("varied", ["seed", "position", "id"])
def test_draws_follow_the_softmax(varied):
    """Chi-square against the exact softmax, whichever part of the key runs."""
    logits = torch.randn(33, generator=torch.Generator().manual_seed(1)) * 1.5
    counts = draws(logits, logits, varied, 40_960)
    assert chi_square_p(counts, logits.double().softmax(-1)) > 1e-3


def test_draws_under_limits_follow_the_renormalised_softmax():
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 1.5
    allowed = allow(logits, top_k=12, top_p=0.9)
    counts = draws(logits, logits.masked_fill(~allowed, -INF), "id", 40_960)
    assert not counts[~allowed].any()
    probs = logits.double().masked_fill(~allowed, -INF).softmax(-1)
    assert chi_square_p(counts, probs) > 1e-3


def test_chi_square_notices_a_wrong_distribution():
    """The test above can fail: a temperature 5% off is found."""
    logits = torch.randn(33, generator=torch.Generator().manual_seed(1)) * 1.5
    counts = draws(logits, logits, "id", 40_960)
    assert chi_square_p(counts, (logits / 1.05).double().softmax(-1)) < 1e-3


# -- allowed tokens ------------------------------------------------------------------------------


def allow(logits, top_k=0, top_p=1.0, min_p=0.0):
    rows = logits.view(-1, logits.shape[-1])
    limits = [torch.tensor([v] * len(rows)) for v in (top_k, top_p, min_p)]
    return allowed_tokens(rows, *limits).view(logits.shape)


def allowed_by_hand(logits, top_k, top_p, min_p):
    """min_p and top_k first, then top_p on what is left, renormalised. Distinct logits."""
    probs = {i: math.exp(v) for i, v in enumerate(logits.tolist())}
    order = sorted(probs, key=probs.get, reverse=True)
    kept = [i for i in order if probs[i] >= min_p * probs[order[0]]]
    kept = kept[:top_k] if top_k else kept
    total, above, chosen = sum(probs[i] for i in kept), 0.0, set()
    for i in kept:
        if above < top_p * total:
            chosen.add(i)
        above += probs[i]
    return chosen


@pytest.mark.parametrize("vocab_size", [5, 33, 331])
@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 400])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3, 1.0])
def test_allowed_sets_are_exact(vocab_size, top_k, top_p, min_p):
    """Against sets computed one token at a time."""
    for seed in range(4):
        logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
        assert len(set(logits.tolist())) == vocab_size
        found = set(allow(logits, top_k, top_p, min_p).nonzero().flatten().tolist())
        assert found == allowed_by_hand(logits, top_k, top_p, min_p), seed


def test_each_row_keeps_its_own_limits():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    limits = torch.tensor([3, 0, 0]), torch.tensor([1.0, 0.5, 1.0]), torch.tensor([0.0, 0.0, 0.5])
    found = allowed_tokens(logits, *limits)
    alone = [allow(logits[0], top_k=3), allow(logits[1], top_p=0.5), allow(logits[2], min_p=0.5)]
    assert_same_bits(found, torch.stack(alone))


def test_top_p_counts_what_top_k_left():
    """The share is of what top_k left, renormalised; the other order would keep more."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert allow(logits, top_p=0.69).tolist() == [True, True, False, False]
    # Of 0.7 that top_k = 2 leaves, 0.4 is 57%: enough for 0.55, not for 0.6.
    assert allow(logits, top_k=2, top_p=0.55).tolist() == [True, False, False, False]
    assert allow(logits, top_k=2, top_p=0.6).tolist() == [True, True, False, False]
    assert allow(logits, top_p=0.55).tolist() == [True, True, False, False]


def test_ties_with_a_threshold_are_all_kept():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    assert allow(logits, top_k=2).tolist() == [False, True, True, True, True, False]
    assert allow(logits, top_k=1).tolist() == [False, True, False, False, False, False]
    equal = torch.zeros(8)
    assert allow(equal, top_k=3).all()
    assert allow(equal, top_p=0.01).all()
    assert allow(equal, min_p=1.0).all()
    # Above the tie of 2.0 stands 3.0 alone, with 0.43 of the mass.
    assert allow(logits, top_p=0.5).tolist() == [False, True, True, True, True, False]
    assert allow(logits, top_p=0.4).tolist() == [False, True, False, False, False, False]


def test_a_top_p_of_one_keeps_all():
    """Also what is lost in the sum of the mass."""
    logits = torch.tensor([-30.0, 5.0, -40.0])
    assert allow(logits, top_p=1.0).all()
    assert allow(logits, top_k=2, top_p=1.0).tolist() == [True, True, False]
    assert allow(logits, top_p=0.999).tolist() == [False, True, False]


def test_forbidden_tokens_stay_forbidden():
    """-inf (a stop token before min_new_tokens) is never drawn and takes no mass."""
    logits = torch.tensor([-INF, 1.0, 0.0, -INF])
    for limits in ({}, {"top_k": 3}, {"top_p": 0.999}, {"min_p": 0.01}):
        candidates = logits.masked_fill(~allow(logits, **limits), -INF)
        counts = draws(logits, candidates, "id", 8192)
        assert counts[0] == counts[3] == 0
        assert counts[2] > 0


def test_the_only_allowed_token_is_drawn_whatever_its_noise():
    """Noise of -inf (v rounded up to 1) must not hand the draw to a forbidden token."""
    noise = torch.tensor([[0.0, 5.0, -INF, 1.0], [-INF, 0.0, -INF, -INF]])
    logits = torch.tensor([[-INF, -INF, 0.3, -INF], [-INF, -INF, 0.0, -3.0]])
    assert sample(logits, noise).tolist() == [2, 2]
    free = torch.zeros(1, 4)
    assert sample(free, torch.tensor([[-INF, -9.0, -INF, -INF]])).tolist() == [1]


def test_greedy_ties_go_to_the_lower_id():
    """At every width: a vectorised argmax may find another maximum first."""
    for width in (2, 7, 8, 16, 17, 33, 64, 100, 331, 1025, 40_000):
        zeros = torch.zeros(3, width)
        assert sample(zeros, zeros).tolist() == [0, 0, 0]
        for first in {0, width // 3, width - 2}:
            logits = torch.full((1, width), -1.0)
            logits[0, first] = logits[0, -1] = 2.0
            assert sample(logits, torch.zeros(1, width)).tolist() == [first]
