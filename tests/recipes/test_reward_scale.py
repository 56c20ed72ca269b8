"""Rewards that are normalized by all that came before: by hand, in a run, and where it resumes."""

import math
import re

import numpy as np
import pytest
import torch

from samebit.recipes.cli.compose import resolve
from samebit.recipes.config import ConfigError
from samebit.recipes.data.reward_config import RewardConfig
from samebit.recipes.data.reward_scale import NO_REWARDS, RewardScale, moments_with
from samebit.recipes.run.rollouts import list_rollouts, load_rollout
from samebit.trainer.checkpoint import latest_checkpoint

WORDS = ["algorithm=rloo", "reward.normalize=running", "reward.clip=1.25"]
WORDS += ["logger.save_rollouts=true", "rollout.eval_every=2"]


def rewards(*groups):
    return torch.tensor(groups, dtype=torch.float64)


def test_two_steps_by_hand():
    """0 and 4: mean 2, deviation 2. Then 2 and 2 and 6 and 6 with them: mean 20 / 6, squares
    (100 + 16 + 16 + 4 + 64 + 64) / 9 of six, deviation sqrt(44 / 9)."""
    scale = RewardScale(RewardConfig(normalize="running", clip=1.25), NO_REWARDS)
    assert scale.scaled(rewards([0.0, 4.0])).tolist() == [[-1.0, 1.0]]
    found = scale.scaled(rewards([2.0, 2.0], [6.0, 6.0]))
    few, many = (2 - 20 / 6) / math.sqrt(44 / 9), (6 - 20 / 6) / math.sqrt(44 / 9)
    assert found.tolist() == [pytest.approx([x, x], abs=1e-12) for x in (few, many)]
    assert scale.metrics == {
        "rollout/reward_running_mean": pytest.approx(20 / 6, abs=1e-12),
        "rollout/reward_running_std": pytest.approx(math.sqrt(44 / 9), abs=1e-12),
    }
    assert scale.scaled(rewards([100.0, 3.0]))[0, 0] == 1.25


def test_what_is_not_normalized_is_cut_or_left():
    plain, cut = (RewardScale(RewardConfig(clip=clip), NO_REWARDS) for clip in (0.0, 0.5))
    given = rewards([-3.0, 0.25])
    assert torch.equal(plain.scaled(given), given)
    assert cut.scaled(given).tolist() == [[-0.5, 0.25]]
    assert (plain.seen, plain.metrics) == (NO_REWARDS, {})


def test_moments_are_those_of_all_rewards_together():
    """However they are parted; also far from 0, where squares would cancel."""
    drawn = np.random.default_rng(3).normal(1e6, 0.5, 600)
    seen, groups = NO_REWARDS, np.split(drawn, [1, 50, 53, 400])
    for part in groups:
        seen = moments_with(seen, part.tolist())
    assert seen[0] == 600
    assert seen[1] == pytest.approx(drawn.mean(), rel=1e-14)
    assert seen[2] / 600 == pytest.approx(drawn.var(), rel=1e-9)


@pytest.mark.parametrize("reward", [7.5, 0.7, 0.1, -1 / 3])
def test_equal_rewards_are_zeros(reward):
    """Those too whose sum is rounded: twelve times 0.7 is not twelve of them."""
    scale = RewardScale(RewardConfig(normalize="running"), NO_REWARDS)
    for count in (12, 6, 7):
        assert scale.scaled(rewards([reward] * count)).tolist() == [[0.0] * count]
    assert scale.metrics["rollout/reward_running_mean"] == reward


@pytest.mark.parametrize("far", [1e200, 1.7e308])
def test_rewards_too_far_apart_are_refused(far):
    with pytest.raises(ValueError, match=re.escape(f"from {-far} to {far}, and those before lie")):
        moments_with(NO_REWARDS, [-far, far])


def test_a_run_goes_by_all_its_rewards_and_resumes(runs):
    """Figures of each step are of all rewards so far, by the files of rollouts; a run that goes on
    behind step 2 comes to the same bytes. Unscaled ones have another gradient."""
    whole = runs.train("whole", *WORDS, "trainer.num_steps=4")
    seen = []
    for step, file in list_rollouts(runs.folder / "whole").items():
        seen += [sample.reward for sample in load_rollout(file)]
        row = whole[1][step]
        assert row["rollout/reward_running_mean"] == pytest.approx(np.mean(seen), rel=1e-12)
        assert row["rollout/reward_running_std"] == pytest.approx(np.std(seen), rel=1e-12)
        assert row["rollout/reward_mean"] == pytest.approx(np.mean(seen[-12:]), rel=1e-12)
    runs.train("parts", *WORDS, "trainer.num_steps=2")
    progress = latest_checkpoint(runs.folder / "parts" / "checkpoints").manifest["progress"]
    assert progress["rewards_seen"][0] == 24
    assert runs.train("parts", *WORDS, "trainer.num_steps=4", "resume=true") == whole
    plain = [word for word in WORDS if "reward." not in word]
    [_, first] = runs.train("plain", *plain, "trainer.num_steps=1")[1]
    assert first["rollout/reward_mean"] == whole[1][1]["rollout/reward_mean"]
    assert first["train/grad_norm"] != whole[1][1]["train/grad_norm"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward.normalize=batch"], "reward.normalize is 'batch'; it must be one of"),
        (["reward.clip=-1"], "reward.clip is -1.0; it must be 0, or positive and finite"),
        (
            ["reward.normalize=running", "algorithm.length_penalty=relative"],
            "algorithm.length_penalty is 'relative'; it must be another one with reward.normalize",
        ),
        (
            ["reward.clip=1", "algorithm=distillation", "distillation.teacher=t"],
            "reward.clip is 1.0; it must be 0.0, its default: nothing reads it where algo",
        ),
    ],
)
def test_settings_that_cannot_be(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve("grpo", ["model.path=m", "data.path=d.jsonl", *words])
