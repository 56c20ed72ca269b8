"""Rewards to advantages: penalties, baselines and whitening, by hand."""

import math

import numpy as np
import pytest
import torch

from samebit.trainer.algorithms.registry import find_algorithm
from samebit.trainer.algorithms.rloo import leave_one_out
from samebit.trainer.algorithms.shaping import length_penalties, shaped_rewards, whitened
from samebit.trainer.config import GrpoConfig
from samebit.trainer.types import Sample

NAMES = ("grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


def sample(num_trained, distances=None):
    """A sample of so many tokens; distances: its log-probs minus the reference's."""
    made = Sample.of_response(
        sample_id=0,
        token_ids=(9, 9, *range(num_trained)),
        prompt_len=2,
        logprobs=[-1.0] * num_trained,
    )
    if distances is None:
        return made
    reference = made.in_place([-1.0 - d for d in distances], "ref_logprobs")
    return Sample(**vars(made) | {"ref_logprobs": reference})


def make(name, **settings):
    found = find_algorithm(name)
    return found(found.Config(name=name, **settings))


def advantages(algorithm, rewards, groups):
    """One number a sample where all its tokens have the same, else those of the trained ones."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    found = algorithm.advantages(rewards, groups)
    return [
        [x if np.ndim(x) == 0 else x[s.loss_mask].tolist() for s, x in zip(g, row, strict=True)]
        for g, row in zip(groups, found, strict=True)
    ]


def test_the_overlong_penalty_by_hand():
    """Of 20 tokens the last 0.2 x 20 = 4: 16 cost nothing, 17 a quarter, 20 and more the whole."""
    config = GrpoConfig(length_penalty="overlong", max_response_len=20, length_penalty_coef=0.5)
    groups = [[sample(n) for n in (1, 16, 17, 19)], [sample(n) for n in (18, 20, 21, 40)]]
    found = length_penalties(torch.ones(2, 4), groups, config)
    assert found.flatten().tolist() == pytest.approx([0, 0, 0.25, 0.75, 0.5, 1, 1, 1], abs=1e-12)
    shaped = shaped_rewards(torch.ones(2, 4), groups, config)
    assert shaped[0].tolist() == pytest.approx([1, 1, 0.875, 0.625], abs=1e-12)


def test_the_relative_penalty_by_hand():
    """Lengths 2 to 10: (len - 2) / 8 - 1/2, of which a wrong sample gains nothing."""
    config = GrpoConfig(length_penalty="relative")
    groups = [[sample(n) for n in (2, 4, 10, 2)], [sample(3)] * 4]
    rewards = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    found = length_penalties(rewards, groups, config).tolist()
    assert found == [[-0.5, -0.25, 0.5, 0.0], [0.0] * 4]
    assert shaped_rewards(rewards, groups, config)[0].tolist() == [1.5, 1.25, 0.5, 0.0]


@pytest.mark.parametrize(
    ("estimator", "sums"),
    [("k1", [0.75, -0.5]), ("k2", [0.15625, 0.125]), ("k3", [0.1353313, 0.1487213])],
)
def test_the_kl_in_the_reward_by_hand(estimator, sums):
    """Distances 0.5, 0.25 and -0.5. k1: 0.75; -0.5. k2: 0.125 + 0.03125; 0.125.
    k3: (0.6065307 - 0.5) + (0.7788008 - 0.75); 1.6487213 - 1.5."""
    config = GrpoConfig(kl_coef=2.0, kl_estimator=estimator, kl_in="reward")
    groups = [[sample(2, [0.5, 0.25]), sample(1, [-0.5])]]
    found = shaped_rewards(torch.tensor([[1.0, 1.0]]), groups, config).tolist()
    assert found == [pytest.approx([1 - 2 * x for x in sums], abs=1e-6)]


def test_leave_one_out_by_hand():
    """1 - (0 + 0 + 0.5) / 3; 0 - (1 + 0 + 0.5) / 3; 0.5 - 1 / 3."""
    rewards = [[1.0, 0.0, 0.0, 0.5], [3.0] * 4]
    expected = [5 / 6, -0.5, -0.5, 1 / 6]
    found = advantages(make("rloo"), rewards, [[sample(1)] * 4] * 2)
    assert found == [pytest.approx(expected, abs=1e-12), [0.0] * 4]
    # n / (n - 1) times a reward minus the mean of all.
    assert leave_one_out(torch.tensor([[2.0, 4.0]])).tolist() == [[-2.0, 2.0]]


def test_reinforce_plus_plus_by_hand():
    """Rewards 4, 0 and 1 of 1, 2 and 1 tokens: mean 5 / 4, squares 16 + 1 over 4 tokens, so the
    variance is 17 / 4 - 25 / 16 = 43 / 16."""
    groups, deviation = [[sample(1)], [sample(2)], [sample(1)]], math.sqrt(43) / 4
    algorithm = make("reinforce_plus_plus", std_eps=0.0)
    found = advantages(algorithm, [[4.0], [0.0], [1.0]], groups)
    expected = [[2.75 / deviation], [-1.25 / deviation] * 2, [-0.25 / deviation]]
    assert [row[0] for row in found] == [pytest.approx(x, rel=1e-6) for x in expected]
    # Another prompt's reward moves it: of the training step all count, and nothing beyond.
    other = advantages(algorithm, [[4.0], [0.0], [4.0]], groups)
    assert other[0] != found[0]


def test_reinforce_plus_plus_has_the_kl_of_what_follows():
    """Distances 0.5, 0.25 and -0.5, weight 2: returns 1 - 1.5, 1 - 0.5; 0 + 1. Their mean is 1/3,
    their variance (0.25 + 0.25 + 1) / 3 - 1/9 = 7/18."""
    groups = [[sample(2, [0.5, 0.25]), sample(1, [-0.5])]]
    algorithm = make("reinforce_plus_plus", kl_coef=2.0, std_eps=0.0)
    assert (algorithm.needs_reference, algorithm.rewards_need_reference) == (False, True)
    [found] = advantages(algorithm, [[1.0, 0.0]], groups)
    deviation = math.sqrt(7 / 18)
    expected = [(x - 1 / 3) / deviation for x in (-0.5, 0.5, 1.0)]
    assert found[0] + found[1] == pytest.approx(expected, rel=1e-6)


def test_reinforce_plus_plus_baseline_by_hand():
    """Rewards 3, 1 and 5, 5: centred 1, -1 and 0, 0 of 1, 3, 1 and 1 tokens. Their mean is -1/3,
    the variance 4/6 - 1/9 = 5/9."""
    groups = [[sample(1), sample(3)], [sample(1)] * 2]
    found = advantages(make("reinforce_plus_plus_baseline", std_eps=0.0), [[3, 1], [5, 5]], groups)
    up, down, middle = (x / math.sqrt(5 / 9) for x in (4 / 3, -2 / 3, 1 / 3))
    assert found[0][0] == pytest.approx([up], rel=1e-6)
    assert found[0][1] == pytest.approx([down] * 3, rel=1e-6)
    assert found[1] == [pytest.approx([middle], rel=1e-6)] * 2


def test_the_deviation_of_the_batch_by_hand():
    """Centred 1, -1 and 2, -2, by the deviation of 2, 0, 5, 1: sqrt(14 / 3), its mean being 2."""
    for name in ("grpo", "gspo", "cispo"):
        algorithm = make(name, std_over="batch", std_eps=0.0)
        found = advantages(algorithm, [[2, 0], [5, 1]], [[sample(1)] * 2] * 2)
        deviation = math.sqrt(14 / 3)
        expected = [[1 / deviation, -1 / deviation], [2 / deviation, -2 / deviation]]
        assert found == [pytest.approx(row, rel=1e-6) for row in expected]


@pytest.mark.parametrize("reward", [0.0, 1 / 3, -7.7e8])
@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_teach_nothing(name, reward):
    """Exact zeros, in every algorithm; by the deviation of the batch too."""
    groups, settings = [[sample(3), sample(1)]] * 2, [{}]
    if name in ("grpo", "gspo", "cispo"):
        settings.append({"std_over": "batch"})
    for each in settings:
        found = advantages(make(name, **each), [[reward] * 2] * 2, groups)
        assert all(np.all(np.asarray(x) == 0) for row in found for x in row)


@pytest.mark.parametrize("name", NAMES)
def test_groups_that_a_filter_has_emptied(name):
    """No prompts, or none with a sample: no advantages."""
    for settings in ({}, {"length_penalty": "relative"}, {"kl_coef": 0.5, "kl_in": "reward"}):
        if settings.get("kl_coef"):
            settings |= {"kl_estimator": "k1"}
        algorithm = make(name, **settings)
        assert list(algorithm.advantages(torch.zeros(0, 4, dtype=torch.float64), [])) == []
        empty = algorithm.advantages(torch.zeros(2, 0, dtype=torch.float64), [[], []])
        assert [list(row) for row in empty] == [[], []]


def test_one_sample_of_a_prompt():
    """REINFORCE++ needs no second one; leave-one-out has nobody to compare with."""
    found = advantages(make("reinforce_plus_plus"), [[1.0], [0.0]], [[sample(1)]] * 2)
    assert found == [[pytest.approx([1.0], rel=1e-5)], [pytest.approx([-1.0], rel=1e-5)]]
    with pytest.raises(ValueError, match="a prompt has 1 sample; leave-one-out needs at least 2"):
        leave_one_out(torch.ones(3, 1))
    least = {name: find_algorithm(name).Config.min_samples_per_prompt for name in NAMES}
    assert least == dict.fromkeys(NAMES, 2) | {"reinforce_plus_plus": 1}


@pytest.mark.parametrize("wide", [1e200, 1e39])
@pytest.mark.parametrize("name", NAMES)
def test_rewards_too_far_apart_are_refused(name, wide):
    """Unless they are only scaled, where the deviation is finite."""
    groups = [[sample(1)] * 2] * 2
    if wide == 1e39 and name != "rloo":
        advantages(make(name), [[0.0, 1.0], [wide, -wide]], groups)
        return
    with pytest.raises(ValueError, match="lie too far apart; scale them down"):
        advantages(make(name), [[0.0, 1.0], [wide, -wide]], groups)


def test_whitening_is_of_all_tokens():
    """Mean 0 and deviation 1 over tokens, in any number of groups."""
    rng = np.random.default_rng(3)
    rows = [[rng.normal(size=n) for n in (1, 5)], [rng.normal(size=n) for n in (3, 2)]]
    flat = np.concatenate([x for row in whitened(rows, 0.0) for x in row])
    assert flat.mean() == pytest.approx(0, abs=1e-12)
    assert flat.std() == pytest.approx(1, rel=1e-12)
