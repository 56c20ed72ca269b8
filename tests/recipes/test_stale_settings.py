"""rollout.max_staleness: the schedule of weight versions, and what is refused."""

import re

import pytest
from run_children import in_one_process

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.dry_run import describe_grpo
from samebit.recipes.config import ConfigError
from samebit.recipes.rollout_config import RolloutSection


def test_the_schedule_is_a_function_of_the_step():
    """The weights after the step before the last one, at staleness 1."""
    settings = [RolloutSection(max_staleness=k) for k in range(3)]
    drawn = [[each.drawn_after(step) for step in range(1, 7)] for each in settings]
    assert drawn == [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4], [0, 0, 0, 1, 2, 3]]


@pytest.mark.parametrize(("every", "stale"), [(1, 3), (2, 1), (2, 2), (2, 4), (3, 2), (3, 5)])
def test_weights_that_go_every_few_steps(every, stale):
    """No sample is older than max_staleness, or than it has to be; all are by weights that the
    engine has got, of which it needs no two at a time."""
    settings = RolloutSection(max_staleness=stale, weight_sync_steps=every)
    drawn = [settings.drawn_after(step) for step in range(1, 30)]
    assert drawn == sorted(drawn)
    for step, after in enumerate(drawn, 1):
        assert settings.syncs_after(after)
        assert 0 <= step - 1 - after <= stale
        assert after == 0 or step - 1 - (after - every) > stale


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.max_staleness=-1"], "rollout.max_staleness is -1; it must be 0 or more"),
        (
            ["rollout.max_staleness=1"],
            "rollout.max_staleness is 1; it must be 0 with a colocated engine, which draws and "
            "trains in turns; placement=process has",
        ),
        (
            ["rollout.max_staleness=1", "placement=process", "placement.release_memory=true"],
            "placement.release_memory is True; it must be unset or false with placement.engine=pro",
        ),
        (
            ["rollout.weight_sync_steps=2"],
            "rollout.weight_sync_steps is 2; it must be 1, its default: nothing reads it where "
            "rollout.max_staleness is 0",
        ),
        (
            ["rollout.max_staleness=1", "placement=process", "rollout.weight_sync_steps=3"],
            "rollout.weight_sync_steps is 3; it must be 1 to 2 with rollout.max_staleness=1",
        ),
        (
            ["rollout.check_stale=false"],
            "rollout.check_stale is False; it must be True, its default: nothing reads it where "
            "rollout.max_staleness is 0",
        ),
        (
            ["rollout.max_staleness=1", "placement=process", "rollout.logprobs=truncated"]
            + ["rollout.top_k=5"],
            "rollout.logprobs is 'truncated'; it must be full with rollout.max_staleness",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve("grpo", ["model.path=m", "device=cpu", *words])


def test_a_command_that_trains_no_policy_refuses_it():
    """eagle3's target does not change."""
    meaning = "rollout.max_staleness is 1; it must be 0, its default: nothing reads it where"
    with pytest.raises(ConfigError, match=meaning):
        resolve("eagle3", ["model.path=m", "rollout.max_staleness=1"])


def test_a_dry_run_says_which_weights_draw_and_what_the_comparison_takes(runs, monkeypatch):
    """A copy of the weights on the trainer's device, unless nothing is compared."""
    in_one_process(monkeypatch.setattr)
    words = ["placement=process", "rollout.max_staleness=2"]
    figures = describe_grpo(runs.resolve("run", *words))
    assert figures["step_s_is_drawn_after"] == "max(0, s - 3)"
    assert figures["served_copy_mib"] == figures["weights_mib"] > 0
    figures = describe_grpo(runs.resolve("run", *words, "rollout.check_stale=false"))
    assert figures["served_copy_mib"] == 0
    figures = describe_grpo(runs.resolve("run", *words, "rollout.weight_sync_steps=2"))
    assert figures["step_s_is_drawn_after"] == "max(0, s - 3), or the next multiple of 2"
    figures = describe_grpo(runs.resolve("run"))
    assert not {"served_copy_mib", "step_s_is_drawn_after"} & figures.keys()
