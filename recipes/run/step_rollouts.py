"""A run's rollouts, step by step: when what a training step trains on is drawn, and by whom."""

from collections.abc import Callable
from typing import Any

from samebit.recipes.config import GrpoRun
from samebit.recipes.data.rewards import Poll
from samebit.recipes.run.dynamic_sampling import StepRollout, draw_step
from samebit.recipes.run.sampling import RolloutSource
from samebit.recipes.run.signals import StopSignals
from samebit.recipes.run.training_metrics import PhaseTimer
from samebit.trainer.stats import Comparison
from samebit.trainer.types import StepStats
from samebit.weight_sync.types import WeightVersion


class StepRollouts:
    """Draws a step's rollout when it is asked for, by the weights that are then trained.

    Subclasses draw it ahead of its step, or over several. `close` it when done.
    """

    phase = "rollout"
    """The time of `take` is logged as this phase's."""

    def __init__(self, run: GrpoRun, source: RolloutSource) -> None:
        self._run, self._source = run, source
        self._draws_by: WeightVersion | None = None
        """What the engine has got, if that is what it is to draw by, and a schedule tells of it."""

    def begin(self, trained: int, place: int) -> None:
        """Take note that the weights after step `trained` are served, and nothing is drawn yet.

        place: where step `trained` + 1 begins in the training order.
        """
        settings = self._run.rollout
        tells = settings.has_schedule and settings.syncs_after(trained)
        self._draws_by = self._source.weight_version if tells else None

    def take(
        self, step: int, begin: int, stop: StopSignals, show: Callable[[str], object]
    ) -> StepRollout:
        """Return what a step, from 1 on, has drawn, scored, from the place `begin` of the training
        order on. `show` is told how it goes. Raises what drawing and scoring raise, and Stopped."""
        polls = stop.poll, stop.poll_alone
        return draw_step(self._source, self._run.rollout, step - 1, begin, polls, show)

    def finish(self, timer: PhaseTimer, poll: Poll = lambda: None) -> None:
        """Wait until the engine may get other weights; raises what a draw, or `poll`, raises."""

    def compare_taken(self, timer: PhaseTimer) -> Comparison:
        """Compare, before the step that was taken last is trained, what cannot be compared then."""
        return Comparison()

    def compared(self, first: StepStats) -> Comparison:
        """Return all comparisons that are the last step's, whose first optimizer step is given: it
        ran on the very weights that drew its samples."""
        return Comparison.in_step(first)

    def compare_drawn(self, trained: int, timer: PhaseTimer) -> dict[int, Comparison]:
        """Compare, by step, what other weights than those that are served since step `trained` have
        drawn of later steps, if it is not yet compared."""
        return {}

    def metrics(self, step: int, timer: PhaseTimer) -> dict[str, float]:
        """Return what is logged of the step that was trained, whose rollout was taken last."""
        return {}

    def schedule_row(self, step: int, place: int, of_step: StepRollout) -> dict[str, Any] | None:
        """Return what is logged of when a step was drawn behind which `begin` was called; None if
        the configuration has all steps drawn by the weights that they train.

        place: where the next step begins in the training order.
        """
        settings = self._run.rollout
        if not settings.has_schedule:
            return None
        begin = place - of_step.num_prompts
        return of_step.schedule_row(settings, step, begin, self._draws_by).to_plain()

    def state_dict(self, trained: int) -> dict[str, Any]:
        """What a run that goes on behind step `trained` cannot draw again."""
        return {}

    def close(self) -> None:
        """Abandon what is being drawn. A second call does nothing."""
