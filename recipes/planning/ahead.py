"""A training step where later ones are drawn meanwhile (rollout.max_staleness), phase by phase.

The schedule of versions is the run's own: RolloutSection.drawn_after and syncs_after.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from samebit.recipes.rollout_config import RolloutSection

_CYCLES = 200  # of updates: behind the first half the steps have settled


@dataclass(frozen=True)
class Phases:
    """Holds the seconds of one step: of an engine that draws it, of the trainer that compares what
    older weights drew of a step, and trains it, and of an update.

    left_s: of the trainer that compares what a step leaves to later ones, if the weights that it
    trains have drawn it.
    """

    rollout_s: float
    compare_s: float
    train_s: float
    sync_s: float
    left_s: float = 0.0


def stale_share(rollout: RolloutSection) -> float:
    """Of the steps, those whose samples older weights draw than train on them first."""
    every = rollout.weight_sync_steps
    steps = range(1 + every * (1 + rollout.max_staleness), 1 + every * (2 + rollout.max_staleness))
    return sum(rollout.drawn_after(step) < step - 1 for step in steps) / every


def seconds_of_a_step(rollout: RolloutSection, phases: Phases) -> float:
    """Of a step of a run that is under way, on average.

    As recipes/grpo.py goes about it: an update waits until the engine is idle; behind it the engine
    draws what the new weights draw, while what older ones drew is compared, once, and the trainer
    trains what is there.
    """
    every = rollout.weight_sync_steps
    ends = list(_ends(rollout, phases, _CYCLES * every))
    half = _CYCLES // 2 * every
    return (ends[-1] - ends[-1 - half]) / half


def _ends(rollout: RolloutSection, phases: Phases, num_steps: int) -> Iterator[float]:
    """When each training step ends, in seconds since the run's first draw began."""
    now, drawn, compared = 0.0, dict[int, float](), set[int]()

    def draw(trained: int) -> None:
        end, step = now, max(drawn, default=trained) + 1
        while rollout.drawn_after(step) == trained:
            drawn[step] = end = end + phases.rollout_s
            step += 1

    draw(0)
    for step in range(1, num_steps + 1):
        now = max(now, drawn[step])
        if rollout.drawn_after(step) == step - 1:
            now += phases.left_s
        elif step not in compared:
            now += phases.compare_s
        now += phases.train_s
        if rollout.syncs_after(step):
            now = max(now, drawn[max(drawn)]) + phases.sync_s
            waiting = {later for later in drawn if later > step} - compared
            draw(step)
            now += phases.compare_s * len(waiting)
            compared |= waiting
        yield now
