"""`samebit plan` of runs that draw later steps while one is trained (rollout.max_staleness)."""

import re

import pytest
from plans import ELEMENTS, plan_of, step_of, write_tiny

from samebit.recipes.plan import AHEAD, PARTIAL, summary
from samebit.recipes.planning.ahead import Phases, seconds_of_a_step, stale_share
from samebit.recipes.rollout_config import RolloutSection

APART = ["placement=process", "placement.transport=nccl", "rollout.prompts_per_step=32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("plan") / "tiny")


def drawing(staleness, every=1):
    return RolloutSection(max_staleness=staleness, weight_sync_steps=every)


@pytest.mark.parametrize("staleness", [1, 2, 5])
@pytest.mark.parametrize(
    ("phases", "seconds"),
    [
        (Phases(10, 1, 2, 0.5), 10.5),  # engines have more to do than the trainer
        (Phases(2, 1, 10, 0.5), 11.5),  # less
        (Phases(3, 0, 3, 0), 3),
    ],
)
def test_updates_after_every_step(staleness, phases, seconds):
    """The slower of both, and the update, for which the engine stands still."""
    rollout = drawing(staleness)
    assert seconds_of_a_step(rollout, phases) == pytest.approx(seconds, rel=1e-12)
    assert stale_share(rollout) == 1


def test_updates_after_several_steps():
    """Two steps by each version, by hand: seconds of drawing, comparing, training, updating.

    Staleness 2: of versions 0, 2, 4, ... each draws the steps from 2 behind it on. At 40 the engine
    gets version v, and draws until 60; the trainer compares (1) and trains (2) step v + 1, which is
    there; step v + 2, the version's first, is there at 50, and is trained and compared (it is older
    by one step) until 53; the update waits until 60.
    """
    assert seconds_of_a_step(drawing(2, 2), Phases(10, 1, 2, 0.5)) == pytest.approx(20.5 / 2)
    # The trainer: two steps to compare and to train, and an update; the engine is done before.
    assert seconds_of_a_step(drawing(2, 2), Phases(1, 1, 10, 0.5)) == pytest.approx(22.5 / 2)


def test_a_version_that_draws_all_that_it_may():
    """Staleness 1, an update after every second step: none is drawn when one begins.

    The trainer waits for the first step (10), which is not stale, trains it (2), waits for the
    second (until 20), compares and trains it (3), and updates (0.5).
    """
    rollout = drawing(1, 2)
    assert stale_share(rollout) == 0.5
    assert seconds_of_a_step(rollout, Phases(10, 1, 2, 0.5)) == pytest.approx(23.5 / 2)
    assert seconds_of_a_step(rollout, Phases(10, 1, 20, 0.5)) == pytest.approx(51.5 / 2)


def test_times_and_memory_of_a_plan(tiny):
    """A step waits for nothing but the rest of the rollout; what compares needs a copy."""
    words = [*APART, "cluster.gpus_per_node=2"]
    whole, ahead = (plan_of(tiny, *words, *x) for x in ([], ["rollout.max_staleness=1"]))
    blind = plan_of(tiny, *words, "rollout.max_staleness=1", "rollout.check_stale=false")
    before, times = whole["times"], ahead["times"]
    assert times["rollout_s"] == before["rollout_s"] == before["rollout_wait_s"]
    assert times["train_s"] == before["train_s"]
    step = step_of(tiny, *words, "rollout.max_staleness=1")
    assert times["compare_s"] == step.compare_all_s() > 0 == before["compare_s"]
    assert blind["times"]["compare_s"] == 0
    longer = max(times["rollout_s"], times["compare_s"] + times["train_s"])
    assert times["step_s"] == pytest.approx(longer + times["sync_s"], rel=1e-9)
    shown = ("rollout_wait", "compare", "train", "sync")
    assert times["step_s"] == pytest.approx(sum(times[f"{x}_s"] for x in shown), rel=1e-12)
    tags = [p["memory"]["trainer"]["without_release"] for p in (whole, ahead, blind)]
    assert [t["served_weights"] for t in tags] == [0, 2 * ELEMENTS, 0]
    said = summary(ahead)
    assert AHEAD in said
    assert re.search(r"^rollout wait +[0-9.]+ ", said, re.MULTILINE)
    assert "Engines draw for" in said
    assert "Engines draw for" not in summary(whole)


@pytest.mark.parametrize("drawn", [64, 128, 256, 509])
def test_a_trainer_that_never_waits(tiny, drawn):
    """No rounding makes that less than nothing."""
    words = [*APART, "cluster.gpus_per_node=2", "rollout.max_staleness=1", "cluster.flops_s=1e11"]
    found = plan_of(tiny, *words, f"rollout.max_new_tokens={drawn}")
    assert 0 <= found["times"]["rollout_wait_s"] < 1e-9
    assert " -0.0" not in summary(found)


def test_updates_are_shared_by_steps(tiny):
    words = [*APART, "cluster.gpus_per_node=2", "rollout.max_staleness=3"]
    one, four = (plan_of(tiny, *words, *x) for x in ([], ["rollout.weight_sync_steps=4"]))
    assert four["times"]["sync_s"] == pytest.approx(one["times"]["sync_s"] / 4)


def test_what_on_policy_steps_leave_is_compared_too():
    """As above, where every second step is drawn by the weights that it trains: 4 more for it."""
    phases = Phases(10, 1, 20, 0.5, left_s=4)
    assert seconds_of_a_step(drawing(1, 2), phases) == pytest.approx((51.5 + 4) / 2)
    assert seconds_of_a_step(drawing(1), phases) == pytest.approx(21.5)


@pytest.mark.parametrize("every", [1, 2])
def test_parts_that_are_drawn_ahead(tiny, every):
    """A stint beside training; what is compared of each step are its samples as far as they are
    then: of all ages, or where the present weights have drawn, of all but the last."""
    staleness = ["rollout.max_staleness=1", f"rollout.weight_sync_steps={every}"]
    parts = [*APART, "cluster.gpus_per_node=2", "rollout.partial_tokens=100"]
    step, alone = step_of(tiny, *parts, *staleness), plan_of(tiny, *parts)
    found = plan_of(tiny, *parts, *staleness)
    times, left = found["times"], found["left"]
    assert times["rollout_s"] == alone["times"]["rollout_s"] == alone["times"]["rollout_wait_s"]
    all_s, left_s = step.compare_all_s(), step.compare_s()
    assert alone["times"]["compare_s"] == left_s > 0
    assert all_s == pytest.approx(
        left_s + step_of(tiny, *APART, "cluster.gpus_per_node=2").compare_all_s(), rel=1e-12
    )
    assert times["compare_s"] == (all_s if every == 1 else (all_s + left_s) / 2)
    blind = plan_of(tiny, *parts, *staleness, "rollout.check_stale=false")
    assert blind["times"]["compare_s"] == 0
    shown = ("rollout_wait", "compare", "train", "sync")
    assert times["step_s"] == pytest.approx(sum(times[f"{x}_s"] for x in shown), rel=1e-12)
    assert (left, alone["left"]["most_token_staleness"]) == (
        alone["left"] | {"most_token_staleness": 3},
        2,
    )
    said = summary(found)
    assert AHEAD in said
    assert PARTIAL in said
    assert "Tokens are at most 3 training steps older than what they train." in said


def test_every_step_that_waits_leaves_as_much(tiny):
    """In a checkpoint, and on the host; a step leaves what it does in any schedule."""
    words = [*APART, "cluster.gpus_per_node=2", "rollout.partial_tokens=100"]
    one, three = (plan_of(tiny, *words, f"rollout.max_staleness={k}")["left"] for k in (1, 3))
    assert three["tokens"] == one["tokens"]
    for name in ("checkpoint_bytes", "host_bytes"):
        assert three[name] == 3 * one[name] > 0
