"""A run's rollouts with rollout.partial_tokens: long samples are drawn over several steps."""

from collections.abc import Callable
from typing import Any

from samebit.recipes.config import GrpoRun
from samebit.recipes.run.comparing import compare
from samebit.recipes.run.dynamic_sampling import StepRollout
from samebit.recipes.run.sampling import RolloutSource
from samebit.recipes.run.signals import StopSignals
from samebit.recipes.run.step_rollouts import StepRollouts
from samebit.recipes.run.stints import LeftBySteps, PartialStep, Stints
from samebit.recipes.run.training_metrics import PhaseTimer
from samebit.recipes.run.waiting_parts import WaitingParts, groups_to_state
from samebit.trainer.checkpoint import Checkpoint
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import is_first
from samebit.trainer.stats import Comparison
from samebit.trainer.types import StepStats

STATE = "partial_rollouts"


class PartialRollouts(StepRollouts):
    """Has samples of several steps drawn a part at a time.

    With rollout.check_stale what a step has drawn and does not train on is compared with one more
    forward pass of the weights that drew it, before they change.
    """

    def __init__(
        self,
        run: GrpoRun,
        source: RolloutSource,
        trainer: MegatronTrainer,
        resumed: Checkpoint | None,
    ) -> None:
        super().__init__(run, source)
        self._trainer, self._stints = trainer, Stints(run.rollout, source)
        self._left = LeftBySteps({0: []})
        self._taken: PartialStep | None = None
        self._left_compared = Comparison()
        if resumed is not None:
            state = next(resumed.load_all())[STATE]
            groups = WaitingParts(run.rollout, source, [state]).groups(state)
            self._left = LeftBySteps({resumed.step: list(groups)})

    def take(
        self, step: int, begin: int, stop: StopSignals, show: Callable[[str], object]
    ) -> StepRollout:
        """Draw a step's stints, and return what it is trained on, scored. Raises TooFewGroupsError
        as draw_step does."""
        polls = stop.poll, stop.poll_alone
        self._taken = self._stints.draw(step - 1, begin, self._left[step - 1], polls, show)
        self._left.take(step, self._taken.left)
        return self._taken

    def compare_taken(self, timer: PhaseTimer) -> Comparison:
        """Compare what is left to later steps, as far as the present weights drew it."""
        assert self._taken is not None
        self._left_compared = Comparison()
        left = self._taken.left_samples()
        if left and self._run.rollout.check_stale:
            with timer.time("compare"):
                found = compare(left, self._trainer.logprobs, self._run, self._trainer)
                self._left_compared = found
        return self._left_compared

    def compared(self, first: StepStats) -> Comparison:
        """Return the comparison of what is left together with that of the optimizer step."""
        return super().compared(first) + self._left_compared

    def state_dict(self, trained: int) -> dict[str, Any]:
        """What step `trained` has left; the first process saves it for all."""
        return {STATE: groups_to_state(self._left[trained])} if is_first() else {}
