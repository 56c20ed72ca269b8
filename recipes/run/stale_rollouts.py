"""A run's rollouts with rollout.max_staleness: drawn ahead, compared under what drew them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from samebit.recipes.config import GrpoRun
from samebit.recipes.data.rewards import Poll
from samebit.recipes.run.comparing import compare
from samebit.recipes.run.draws_ahead import DrawnStep, DrawsAhead
from samebit.recipes.run.dynamic_sampling import StepRollout, draw_step
from samebit.recipes.run.inputs import GrpoInputs
from samebit.recipes.run.sampling import RolloutSource
from samebit.recipes.run.signals import StopSignals
from samebit.recipes.run.step_rollouts import StepRollouts
from samebit.recipes.run.training_metrics import PhaseTimer
from samebit.recipes.run.waiting_rollouts import of_state, to_state
from samebit.trainer.checkpoint import Checkpoint
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import is_first
from samebit.trainer.stats import Comparison
from samebit.trainer.types import StepStats

STATE = "waiting_rollouts"


class StaleRollouts(StepRollouts):
    """Has later steps drawn while one is trained.

    With rollout.check_stale it holds a copy of the served weights on the trainer's device: samples
    that the trainer's next weights are trained on are compared with a forward pass of those that
    drew them. `close` it when done.
    """

    phase = "rollout_wait"

    def __init__(
        self,
        run: GrpoRun,
        inputs: GrpoInputs,
        source: RolloutSource,
        trainer: MegatronTrainer,
        resumed: Checkpoint | None,
    ) -> None:
        super().__init__(run, source)
        self._trainer, self._inputs = trainer, inputs
        waiting = {} if resumed is None else self._restored(resumed)
        self._draws = DrawsAhead(self._draw, run.rollout, run.trainer.num_steps, waiting)
        self._served = trainer.like() if run.rollout.check_stale else None
        if self._served is not None:
            # What others drew of `waiting` is compared; a policy that waits has drawn the rest.
            self._served.copy_from(trainer.params)
        self._taken: DrawnStep | None = None
        self._left_compared = Comparison()

    def _draw(self, step: int, begin: int, poll: Poll) -> StepRollout:
        """Draw a step, in the thread; all are drawn one behind another."""
        return draw_step(self._source, self._run.rollout, step - 1, begin, (poll, poll))

    def _restored(self, resumed: Checkpoint) -> dict[int, DrawnStep]:
        """What was drawn of later steps, by step."""
        saved = next(resumed.load_all())[STATE]
        prompts_of, decode = self._source.training_prompts, self._inputs.text.decode
        return {s: of_state(x, partial(prompts_of, s - 1), decode) for s, x in saved.items()}

    def begin(self, trained: int, place: int) -> None:
        """See DrawsAhead.begin."""
        super().begin(trained, place)
        self._draws.begin(trained, place)

    def take(
        self, step: int, begin: int, stop: StopSignals, show: Callable[[str], object]
    ) -> StepRollout:
        """Return a step's rollout, once it is drawn; raises what its draw, or `stop`, raises."""
        self._taken = self._draws.take(step, stop.poll)
        return self._taken.rollout

    def finish(self, timer: PhaseTimer, poll: Poll = lambda: None) -> None:
        """Wait until the engine is idle: a sample is drawn by one version."""
        with timer.time("rollout_wait"):
            self._draws.finish(poll)

    def compare_taken(self, timer: PhaseTimer) -> Comparison:
        """Compare what other weights drew than the trainer's, where they are still served; and of
        what its own drew that which is left to later steps."""
        taken = self._taken
        assert taken is not None
        self._left_compared = Comparison()
        with timer.time("compare"):
            self._compare({0: taken})
            if taken.comparison is None and self._served is not None:
                left, forward = taken.rollout.left_samples(), self._trainer.logprobs
                self._left_compared = compare(left, forward, self._run, self._trainer)
        return taken.comparison or self._left_compared

    def compared(self, first: StepStats) -> Comparison:
        """Return the comparison that was made before, or else that of the optimizer step, and of
        what its weights have left."""
        made = None if self._taken is None else self._taken.comparison
        return made or super().compared(first) + self._left_compared

    def compare_drawn(self, trained: int, timer: PhaseTimer) -> dict[int, Comparison]:
        """Compare what was drawn by the weights that were served before, and take note of those
        that are served now; nothing where those are still the ones that were."""
        if not self._run.rollout.syncs_after(trained):
            return {}
        with timer.time("compare"):
            found = self._compare(self._draws.waiting(trained))
            if self._served is not None:
                self._served.copy_from(self._trainer.params)
        return found

    def _compare(self, steps: dict[int, DrawnStep]) -> dict[int, Comparison]:
        """By step, those of what is not compared yet, and not by the trainer itself."""
        if self._served is None:
            return {}
        found = {}
        for step, drawn in steps.items():
            if drawn.comparison is None and drawn.rollout.version.step != self._trainer.step:
                of_step, forward = drawn.rollout.drawn_samples(), self._served.logprobs
                drawn.comparison = compare(of_step, forward, self._run, self._trainer)
                found[step] = drawn.comparison
        return found

    def metrics(self, step: int, timer: PhaseTimer) -> dict[str, float]:
        """Return what is logged of the step that was trained, whose rollout was taken last.

        overlap_s: how long the engine drew while this process did not wait for it.
        """
        assert self._taken is not None
        waited, drawn_s = timer.seconds["perf/rollout_wait_s"], self._taken.seconds
        return {
            "rollout/staleness": step - 1 - self._run.rollout.drawn_after(step),
            "rollout/weight_step": self._taken.rollout.version.step,
            "perf/overlap_s": max(0.0, self._draws.busy_s(timer.start) - waited),
            **({} if drawn_s is None else {"perf/rollout_s": drawn_s}),
        }

    def state_dict(self, trained: int) -> dict[str, Any]:
        """What a run that goes on behind step `trained` cannot draw again, nor compare; the first
        process saves it for all."""
        waiting = self._draws.waiting(trained)
        self._compare(waiting)
        if not is_first():
            return {}
        return self._to_state(trained, waiting)

    def _to_state(self, trained: int, waiting: dict[int, DrawnStep]) -> dict[str, Any]:
        """What `_restored` gives back."""
        return {STATE: {step: to_state(drawn) for step, drawn in waiting.items()}}

    def close(self) -> None:
        """Abandon what is being drawn; no thread is left."""
        self._draws.close()
