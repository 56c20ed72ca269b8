"""PPO's advantages and its critic's loss: by hand, and against literal formulas in fp64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from samebit.trainer.algorithms.ppo import Ppo, PpoConfig
from samebit.trainer.critic.config import CriticConfig
from samebit.trainer.critic.gae import advantage_estimates
from samebit.trainer.critic.value_loss import value_losses
from samebit.trainer.types import Sample


def of(name="ppo", **settings):
    return Ppo(PpoConfig(name=name, **settings))


def sample(values, mask=None, distances=None):
    """A sample whose trained tokens have these values; distances: log-probs minus reference's."""
    mask = [False, *[True] * len(values)] if mask is None else mask
    made = Sample(sample_id=0, token_ids=np.arange(len(mask)), loss_mask=mask)
    made = replace(made, values=made.in_place(values, "values"))
    made = made.with_logprobs([-1.0] * len(values))
    if distances is None:
        return made
    reference = made.in_place([-1.0 - d for d in distances], "ref_logprobs")
    return replace(made, ref_logprobs=reference)


def trained(rows, groups):
    """[prompts][samples][tokens trained on]."""
    return [
        [x[s.loss_mask].tolist() for x, s in zip(*pair, strict=True)]
        for pair in zip(rows, groups, strict=True)
    ]


def test_estimates_by_hand():
    """gamma = lam = 1/2: deltas -3/8, -1/2 and 3/2, each with a quarter of what follows."""
    rewards, values = np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.25, -0.5])
    found = advantage_estimates(rewards, values, 0.5, 0.5)
    assert found.tolist() == pytest.approx([-0.40625, -0.125, 1.5], abs=1e-12)
    group = [[sample(values)]]
    returns = of(gamma=0.5, lam=0.5).returns(torch.tensor([[1.0]]), group)
    assert trained(returns, group)[0][0] == pytest.approx([0.09375, 0.125, 1.0], abs=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0)])
def test_estimates_are_the_papers_sums(gamma, lam):
    """Equation 16: the sum over l of (gamma lam)^l delta_(t+l); lam = 1 is returns less values."""
    generator = np.random.default_rng(1)
    rewards, values = generator.normal(size=9), generator.normal(size=9)
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 9)) for t in range(9)]
    found = advantage_estimates(rewards, values, gamma, lam)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    if lam == 1.0:
        to_go = [sum(gamma ** (k - t) * rewards[k] for k in range(t, 9)) for t in range(9)]
        assert found.tolist() == pytest.approx((to_go - values).tolist(), abs=1e-12)


def test_text_that_was_not_drawn_is_bridged():
    """As the field's loop over all positions does it: behind a masked token, value and estimate of
    the next drawn one stand; discounts count drawn tokens."""
    mask = [False, True, True, False, False, True, False, True, False]
    values, gamma, lam = [0.3, -0.2, 0.8, 0.1], 0.9, 0.7
    whole = np.full(len(mask), 77.0)  # what a critic says of masked tokens is not read
    whole[mask] = values
    rewards = np.zeros(len(mask))
    rewards[7] = 2.0
    next_value = last = 0.0
    expected = np.zeros(len(mask))
    for t in range(len(mask) - 1, -1, -1):
        if not mask[t]:
            continue
        last = rewards[t] + gamma * next_value - whole[t] + gamma * lam * last
        next_value, expected[t] = whole[t], last
    group = [[replace(sample(values, mask), values=whole)]]
    returns = of(gamma=gamma, lam=lam).returns(torch.tensor([[2.0]]), group)
    found = trained(returns, group)[0][0]
    assert found == pytest.approx((expected + whole)[mask].tolist(), abs=1e-6)


def test_rewards_stand_at_the_last_token_and_costs_at_each():
    """With lam = 1 and values of 0 the returns are sums of what follows: the KL, k1, of each token
    and at the end the reward, less the length's penalty."""
    algorithm = of(kl_coef=0.5, lam=1.0, length_penalty="relative", length_penalty_coef=0.2)
    assert algorithm.rewards_need_reference
    group = [[sample([0.0] * 3, distances=[0.2, -0.4, 0.6]), sample([0.0], distances=[1.0])]]
    found = trained(algorithm.returns(torch.tensor([[1.0, 3.0]]), group), group)
    assert found[0][0] == pytest.approx([0.9 - 0.2, 0.9 - 0.1, 0.9 - 0.3], abs=1e-6)
    assert found[0][1] == pytest.approx([3.1 - 0.5], abs=1e-6)


def test_advantages_are_whitened_over_all_tokens_of_the_step():
    groups = [[sample([0.5, 0.25, -0.5]), sample([1.0])], [sample([0.0, 0.0]), sample([0.5])]]
    # With gamma = lam = 1/2: by the hand above, then 0 - 1, then 2 / 4 and 2, then -1 - 1/2.
    flat = [-0.40625, -0.125, 1.5, -1.0, 0.5, 2.0, -1.5]
    algorithm = of(gamma=0.5, lam=0.5, std_eps=0.0)
    rewards = torch.tensor([[1.0, 0.0], [2.0, -1.0]])
    found = trained(algorithm.advantages(rewards, groups), groups)
    found = [x for group in found for tokens in group for x in tokens]
    mean, deviation = np.mean(flat), np.std(flat)
    assert found == pytest.approx([(x - mean) / deviation for x in flat], abs=1e-6)


def test_value_losses_by_hand():
    """Clipped at 1/2: a value that ran past its bound towards the return, one that ran away from
    it, one within, and one that is where it was."""
    values = torch.tensor([1.0, -1.0, 0.25, 0.0], requires_grad=True)
    old, returns = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 2.0])
    config = CriticConfig(cliprange_value=0.5, vf_coef=0.5)
    found = value_losses(values, old, returns, config)
    assert found.losses.tolist() == pytest.approx([0.125, 2.0, 0.28125, 2.0], abs=1e-7)
    assert found.metrics["critic/vf_clipfrac"].tolist() == [1, 0, 0, 0]
    assert found.metrics["critic/vpred_mean"].tolist() == [1.0, -1.0, 0.25, 0.0]
    found.losses.sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, -2.0, -0.75, -2.0], abs=1e-7)
    free = value_losses(values, old, returns, CriticConfig(cliprange_value=0.0, vf_coef=1.0))
    assert free.losses.tolist() == pytest.approx([0.0, 4.0, 0.5625, 4.0], abs=1e-7)
    assert "critic/vf_clipfrac" not in free.metrics


def test_gradients_of_value_losses_are_the_literal_ones():
    """max of both squares, in fp64, as it is written down."""
    generator = torch.Generator().manual_seed(2)
    values, old, returns = (torch.randn(200, generator=generator) for _ in range(3))
    found, literal = values.clone().requires_grad_(), values.double().requires_grad_()
    value_losses(found, old, returns, CriticConfig(cliprange_value=0.3)).losses.sum().backward()
    clipped = torch.minimum(torch.maximum(literal, old.double() - 0.3), old.double() + 0.3)
    squares = [(x - returns.double()).square() for x in (literal, clipped)]
    (0.5 * torch.maximum(*squares)).sum().backward()
    assert torch.allclose(found.grad.double(), literal.grad, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PpoConfig(gamma=1.5), r"algorithm.gamma is 1.5; it must be in \[0, 1\]"),
        (lambda: PpoConfig(lam=-0.1), r"algorithm.lam is -0.1; it must be in \[0, 1\]"),
        (lambda: PpoConfig(std_eps=-1.0), "algorithm.std_eps is -1.0; it must be at least 0"),
        (lambda: CriticConfig(cliprange_value=-1.0), "critic.cliprange_value is -1.0; it must be"),
        (lambda: CriticConfig(vf_coef=0.0), "critic.vf_coef is 0.0; it must be positive"),
        (lambda: CriticConfig(warmup_steps=-1), "critic.warmup_steps is -1; it must be at least 0"),
        (lambda: CriticConfig(model=""), "critic.model is ''; it must be the path of a folder"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
