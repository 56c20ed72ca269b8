"""A run's rollouts with rollout.max_staleness and rollout.partial_tokens: steps are drawn ahead, in
stints, each of which goes on with what the step before has left."""

from collections.abc import Callable, Sequence
from typing import Any

from samebit.recipes.config import GrpoRun
from samebit.recipes.data.rewards import Poll
from samebit.recipes.run.draws_ahead import DrawnStep
from samebit.recipes.run.dynamic_sampling import StepRollout
from samebit.recipes.run.inputs import GrpoInputs
from samebit.recipes.run.sampling import RolloutSource
from samebit.recipes.run.signals import StopSignals
from samebit.recipes.run.stale_rollouts import STATE, StaleRollouts
from samebit.recipes.run.stints import LeftBySteps, PartialGroup, PartialStep, Stints
from samebit.recipes.run.waiting_parts import WaitingParts, groups_to_state, step_to_state
from samebit.trainer.checkpoint import Checkpoint
from samebit.trainer.megatron.trainer import MegatronTrainer

LEFT = "waiting_parts"
"""What the step leaves after which a checkpoint is made, unless later steps wait in it."""


class StaleParts(StaleRollouts):
    """Has later steps drawn while one is trained, their samples a part at a time.

    A step's weights go on with samples that earlier ones began; they are compared, as those of
    StaleRollouts are, with what they have drawn of each.
    """

    def __init__(
        self,
        run: GrpoRun,
        inputs: GrpoInputs,
        source: RolloutSource,
        trainer: MegatronTrainer,
        resumed: Checkpoint | None,
    ) -> None:
        self._stints = Stints(run.rollout, source)
        self._newest: Sequence[PartialGroup] = []
        """What the step leaves that was drawn last; it is the drawing thread's."""
        self._left = LeftBySteps({0: []})
        super().__init__(run, inputs, source, trainer, resumed)

    def take(
        self, step: int, begin: int, stop: StopSignals, show: Callable[[str], object]
    ) -> StepRollout:
        """Return a step's rollout, once it is drawn; raises what its draw, or `stop`, raises."""
        found = super().take(step, begin, stop, show)
        self._left.take(step, _left_by(found))
        return found

    def _draw(self, step: int, begin: int, poll: Poll) -> StepRollout:
        found = self._stints.draw(step - 1, begin, self._newest, (poll, poll))
        self._newest = found.left
        return found

    def _restored(self, resumed: Checkpoint) -> dict[int, DrawnStep]:
        state = next(resumed.load_all())
        saved, left = state[STATE], state[LEFT]
        of_steps = [x[key] for x in saved.values() for key in ("ended", "left")]
        parts = WaitingParts(self._run.rollout, self._source, [*of_steps, left])
        found = {step: parts.step(x) for step, x in saved.items()}
        self._newest = list(parts.groups(left))
        self._left = LeftBySteps({resumed.step: self._newest})
        if found:
            self._newest = _left_by(found[max(found)].rollout)
        return found

    def _to_state(self, trained: int, waiting: dict[int, DrawnStep]) -> dict[str, Any]:
        left = [] if waiting else self._left[trained]
        steps = {step: step_to_state(drawn) for step, drawn in waiting.items()}
        return {STATE: steps, LEFT: groups_to_state(left)}


def _left_by(step: StepRollout) -> Sequence[PartialGroup]:
    assert isinstance(step, PartialStep)
    return step.left
