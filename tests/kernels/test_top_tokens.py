"""The likeliest tokens of rows, and the reverse KL over them and the rest."""

import math

import pytest
import torch

from samebit.kernels.top_tokens import TopTokens, reverse_kl, top_tokens

T, D, V = 9, 16, 331


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    """Probabilities 1/8, 1/2, 1/8, 1/4: of equal ones the lower id comes first."""
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    top = top_tokens(logits, 3)
    assert top.token_ids.tolist() == [[1, 3, 0]]
    assert top.logprobs.exp().flatten().tolist() == pytest.approx([0.5, 0.25, 0.125], abs=1e-6)
    assert top.rest.exp().tolist() == pytest.approx([0.125], abs=1e-6)
    assert top_tokens(torch.tensor([[0.0, -0.0, -1.0]]), 2).token_ids.tolist() == [[0, 1]]
    assert top_tokens(logits, 4).rest.tolist() == [-math.inf]


@pytest.mark.parametrize("k", [1, 5, V])
def test_they_are_the_rows_own(k, monkeypatch):
    """As a stable sort has them; no bit depends on the other rows, or on how many go at a time."""
    logits = (4 * rows(1, T, V)).round(decimals=1)  # with ties
    top = top_tokens(logits, k)
    expected = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top.token_ids.long(), expected)
    monkeypatch.setattr("samebit.kernels.top_tokens._MOST_KEYS", 2 * V)
    for alone in (top_tokens(logits, k), *(top_tokens(logits[i : i + 1], k) for i in (0, 4))):
        for name in ("token_ids", "logprobs", "rest"):
            found, whole = getattr(alone, name), getattr(top, name)
            assert any(torch.equal(found, part) for part in (whole, whole[:1], whole[4:5]))
    exact = logits.double().log_softmax(1)
    torch.testing.assert_close(top.logprobs.double(), exact.gather(1, expected), atol=2e-6, rtol=0)
    others = 1 - exact.gather(1, expected).exp().sum(1)
    torch.testing.assert_close(top.rest.double().exp(), others, atol=1e-6, rtol=1e-4)


def literal(hidden, weight, teacher, k, temperature):
    """KL over outcomes, one after another, in fp64; teacher [T, V or more] logits."""
    own = (hidden @ weight.T / temperature).softmax(1)
    other, found = teacher.double().softmax(1), []
    for p, q in zip(own, other, strict=True):
        chosen = q.argsort(descending=True, stable=True)[:k].tolist()
        outcomes = [[i] for i in chosen]
        if rest := [i for i in range(len(q)) if i not in chosen]:
            outcomes.append(rest)
        kl = 0.0
        for outcome in outcomes:
            if here := [i for i in outcome if i < len(p)]:
                mass = p[here].sum()
                kl = kl + mass * (mass / q[outcome].sum()).log()
        found.append(kl)
    return torch.stack(found)


@pytest.mark.parametrize(("k", "more"), [(1, 0), (6, 0), (6, 40), (V, 0), (V + 40, 40)])
def test_kl_and_gradients_are_the_literal_ones(k, more):
    """`more`: tokens that the teacher alone has, which own probabilities know nothing of."""
    hidden, weight = rows(2, T, D) / 4, rows(3, 384, D)
    teacher, share = 2 * rows(4, T, V + more), torch.linspace(0.5, 2, T)
    top, temperature = top_tokens(teacher, k), torch.full((T,), 0.7)
    own = [x.clone().requires_grad_() for x in (hidden, weight)]
    found = reverse_kl(*own, top, temperature, V)
    (found * share).sum().backward()
    exact = [x.double().requires_grad_() for x in (hidden, weight[:V])]
    expected = literal(*exact, teacher, k, 0.7)
    (expected * share).sum().backward()
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6, rel=1e-6)
    assert expected.min() > 1e-3
    for ours, theirs in zip(own, exact, strict=True):
        rest = ours.grad[len(theirs) :]
        error = (ours.grad[: len(theirs)].double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-6
        assert not rest.any()


def test_it_bounds_the_whole_kl_from_below():
    """The more tokens, the nearer; of all tokens it is the KL."""
    hidden, weight, teacher = rows(2, T, D) / 4, rows(3, V, D), 2 * rows(4, T, V)
    whole = literal(hidden.double(), weight.double(), teacher, V, 1.0)
    nearest = torch.zeros(T, dtype=torch.float64)
    for k in (1, 4, 40, 200, V):
        found = reverse_kl(hidden, weight, top_tokens(teacher, k), torch.ones(T), V).double()
        assert (found > nearest - 1e-6).all()
        assert (found < whole + 1e-6).all()
        nearest = found
    torch.testing.assert_close(nearest, whole, atol=1e-6, rtol=1e-6)


def test_the_same_distribution_costs_exactly_nothing():
    """To the bit, with no gradient; whatever is left out."""
    hidden, weight = rows(2, T, D).requires_grad_(), rows(3, V, D)
    scaled = torch.nn.functional.linear(hidden.detach(), weight) / 0.7
    found = reverse_kl(hidden, weight, top_tokens(scaled, 4), torch.full((T,), 0.7), V)
    found.sum().backward()
    assert found.detach().abs().max() < 1e-6
    assert hidden.grad.abs().max() < 1e-5


def test_rows_may_be_none():
    """As of a context rank without a trained token."""
    empty = TopTokens(torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, 3), torch.zeros(0))
    hidden = torch.zeros(0, D, requires_grad=True)
    weight = rows(3, V, D).requires_grad_()
    found = reverse_kl(hidden, weight, empty, torch.zeros(0), V)
    found.sum().backward()
    assert found.shape == (0,)
    assert not weight.grad.any()
