"""Log-probs of truncated distributions, by hand and against fp64, under old and new weights."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_same_bits
from policy_steps import gradient_samples

from samebit.kernels.logprob import kept_sets, logits, logprob, logprob_of, logsumexp, token_stats
from samebit.kernels.sample import allowed_tokens, least_allowed
from samebit.kernels.truncation import KeptSets, Thresholds
from samebit.trainer.packing import pack_samples
from samebit.weight_sync.types import VersionSpan, WeightVersion

INF = float("inf")
SHARES = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
VOCAB, ROWS, WIDTH = 331, 9, 20


def limits(top_k=0, top_p=1.0, min_p=0.0, rows=1):
    return (torch.full((rows,), x) for x in (top_k, top_p, min_p))


def test_by_hand():
    """top_p = 0.6 keeps 0.4 and 0.3 of four tokens: they are 4/7 and 3/7, and the entropy is
    theirs; top_p = 0.75 keeps three."""
    hidden, weight = SHARES.log(), torch.eye(4)
    ids, ones = torch.tensor([2]), torch.ones(1)
    least = least_allowed(hidden, *limits(top_p=0.6))
    found, entropies = logprob(hidden, weight, ids, ones, 4, kept=Thresholds(least))
    assert found.item() == pytest.approx(math.log(3 / 7), abs=1e-6)
    by_hand = -(4 / 7) * math.log(4 / 7) - (3 / 7) * math.log(3 / 7)
    assert entropies.item() == pytest.approx(by_hand, abs=1e-6)
    least = least_allowed(hidden, *limits(top_p=0.75))
    found, _ = logprob(hidden, weight, ids, ones, 4, kept=Thresholds(least))
    assert found.item() == pytest.approx(math.log(0.3 / 0.9), abs=1e-6)


def test_a_token_outside_has_no_probability():
    least = least_allowed(SHARES.log(), *limits(top_k=1))
    found, entropies = logprob(
        *(SHARES.log(), torch.eye(4), torch.tensor([0]), torch.ones(1), 4), kept=Thresholds(least)
    )
    assert (found.item(), entropies.item()) == (-INF, 0.0)


@pytest.fixture
def rows():
    """hidden, weight, ids that may be drawn, temperatures, thresholds, and the mask."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator) / 3 for n in (ROWS, VOCAB + 5))
    temperature = 0.6 + torch.arange(ROWS) / 9
    scaled = logits(hidden, weight, VOCAB) / temperature[:, None]
    bounds = torch.tensor([0, 1, 3, 50] * 3)[:ROWS], 0.3 + torch.arange(ROWS) / 20
    bounds = *bounds, torch.tensor([0.0, 0.01, 0.4] * 3)
    mask, least = allowed_tokens(scaled, *bounds), least_allowed(scaled, *bounds)
    ids = torch.stack([row.nonzero().flatten()[-1] for row in mask])
    return hidden, weight, ids, temperature, Thresholds(least), mask


def exactly(hidden, weight, ids, temperature, mask):
    """Log-probs and entropies in fp64, and the inputs' leaves."""
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    scaled = (leaves[0] @ leaves[1][:VOCAB].T) / temperature[:, None]
    found = scaled.masked_fill(~mask, -INF).log_softmax(-1)
    entropies = -(found.exp() * found.masked_fill(~mask, 0.0)).sum(-1)
    return found.gather(1, ids[:, None]).squeeze(1), entropies, leaves


def backward(values, leaves):
    """Gradients of a function of log-probs and entropies."""
    logprobs, entropies = values
    weights = torch.linspace(-1, 2, ROWS).to(logprobs.dtype)
    (logprobs * weights + entropies * weights.flip(0)).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("moved", [False, True])
def test_values_and_gradients_are_those_of_fp64(rows, moved):
    """Under the weights that drew by thresholds; under others by the sets that are known since."""
    hidden, weight, ids, temperature, kept, mask = rows
    if moved:
        kept = kept_sets(hidden, weight, kept, temperature, VOCAB)
        weight = weight + weight.flip(0) / 5
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    found = logprob(*leaves, ids, temperature, VOCAB, entropy_grad=True, kept=kept)
    *exact, exact_leaves = exactly(hidden, weight, ids, temperature, mask)
    assert_close = torch.testing.assert_close
    for own, other in zip(found, exact, strict=True):
        assert_close(own.double(), other, rtol=1e-6, atol=1e-6)
    for own, other in zip(backward(found, leaves), backward(exact, exact_leaves), strict=True):
        assert_close(own.double(), other, rtol=1e-5, atol=1e-6)


def test_the_sets_are_the_samplers(rows):
    """Thresholds and sets give the same bits, which are the sampler's; parts are parts."""
    hidden, weight, ids, temperature, thresholds, mask = rows
    sets = kept_sets(hidden, weight, thresholds, temperature, VOCAB)
    assert sets.counts.tolist() == mask.sum(-1).tolist()
    assert sets.token_ids.tolist() == mask.nonzero()[:, 1].tolist()
    by_either = [logprob(*rows[:4], VOCAB, kept=kept) for kept in (thresholds, sets)]
    for own, other in zip(*by_either, strict=True):
        assert_same_bits(own, other)
    scaled = (logits(hidden, weight, VOCAB) / temperature[:, None]).masked_fill(~mask, -INF)
    assert_same_bits(by_either[0][0], logprob_of(scaled, ids))
    some = torch.tensor([1, 4, 5])
    picked = sets.select(some)
    assert picked.token_ids.tolist() == mask[some].nonzero()[:, 1].tolist()
    again = picked.spread(some, ROWS).select(some)
    assert again.counts.tolist() == picked.counts.tolist()
    whole = KeptSets.joined([sets.part(slice(0, 4)), sets.part(slice(4, ROWS))])
    assert whole.token_ids.tolist() == sets.token_ids.tolist()


def test_a_rank_restricts_its_own_columns(rows):
    """Its part of the logits, by thresholds or by sets of the whole vocabulary."""
    hidden, weight, _, temperature, thresholds, _ = rows
    sets = kept_sets(hidden, weight, thresholds, temperature, VOCAB)
    scores = logits(hidden, weight, VOCAB)
    for kept in (thresholds, sets):
        whole = kept.restrict(scores.clone(), temperature)
        parts = [
            kept.restrict(scores[:, first : first + 100].clone(), temperature, first)
            for first in range(0, VOCAB, 100)
        ]
        assert_same_bits(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("place", [0, 200, 330])
def test_segments_without_a_token_count_nothing(place):
    """One token of 331 is left, in the first, a middle or the last segment of the sum."""
    row = torch.full((1, VOCAB), -INF)
    row[0, place] = 1.5
    assert logsumexp(row).item() == 1.5
    stats = token_stats(row, torch.ones(1), torch.tensor([place]), True)
    assert [x.item() for x in stats] == [0.0, 0.0, 1.5]


def test_packing_refuses_half_truncated_batches():
    first, second = (s.with_logprobs([-1.0] * s.num_trained) for s in gradient_samples()[:2])
    first = replace(first, thresholds=0 * first.logprobs)
    with pytest.raises(ValueError, match="some samples of a micro-batch have thresholds and some"):
        pack_samples([first, second], 100)
    spans = tuple(VersionSpan(i, WeightVersion(i, "")) for i in (1, 3))
    mixed = replace(first, version_spans=spans)
    with pytest.raises(ValueError, match="sample 0 was drawn by several weight versions"):
        pack_samples([mixed], 100)
