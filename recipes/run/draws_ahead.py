"""Rollouts of later training steps, drawn in the background while a step is trained.

Which weights draw which step is a function of configuration and step: RolloutSection.drawn_after.
One thread draws the steps of a version one behind another; the engine gets the next version once
they are drawn. So time moves no bit. Off-policy by one step: Noukhovitch et al. 2024, "Asynchronous
RLHF", arXiv 2410.18252.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from samebit.recipes.data.rewards import Poll
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.dynamic_sampling import StepRollout
from samebit.recipes.run.signals import Stopped
from samebit.trainer.megatron.setup import TIMEOUT
from samebit.trainer.ranks import begin_of_thread
from samebit.trainer.stats import Comparison
from samebit.weight_sync.objects import gather_objects

_TICK_S = 0.1  # between two polls

type Draw = Callable[[int, int, Poll], StepRollout]
"""draw(step, begin, poll): what a step, counted from 1, draws from a place of the training order
on, scored; called in the thread. `poll` raises Stopped once the run is to end."""


@dataclass
class DrawnStep:
    """Holds a step's rollout until the step is trained."""

    begin: int
    """Its first place in the training order."""
    rollout: StepRollout
    seconds: float | None = None
    """What drawing and scoring took; None if that was before the run was resumed."""
    comparison: Comparison | None = None
    """With the trainer's log-probs under the weights that drew; None if it was not made, or is made
    where the step is trained."""


class DrawsAhead:
    """Draws the steps whose version is served, in a thread, and keeps them until they are trained.

    `close` it when done: what is being drawn is abandoned, and the thread ends. Several processes
    begin a draw together, or not at all once one of them is closed.
    """

    def __init__(
        self,
        draw: Draw,
        settings: RolloutSection,
        num_steps: int,
        waiting: Mapping[int, DrawnStep] | None = None,
    ) -> None:
        """num_steps: the run's; waiting: what a resumed run had drawn, by step from 1 on."""
        self._draw, self._settings, self._num_steps = draw, settings, num_steps
        self._thread = ThreadPoolExecutor(1, "samebit rollout", begin_of_thread(TIMEOUT))
        self._ended = threading.Event()
        self._steps: dict[int, Future[DrawnStep]] = {}
        self._busy = deque[list[float]]()  # from when to when each draw took, in their order
        for step, drawn in (waiting or {}).items():
            self._steps[step] = Future()
            self._steps[step].set_result(drawn)

    def begin(self, trained: int, place: int) -> None:
        """Begin to draw what the weights after step `trained` draw, which the engine serves.

        place: where step `trained` + 1 begins in the training order. What is trained is forgotten.
        """
        self._steps = {step: drawn for step, drawn in self._steps.items() if step > trained}
        step = max(self._steps, default=trained) + 1
        while step <= self._num_steps and self._settings.drawn_after(step) == trained:
            before = self._steps.get(step - 1)
            self._steps[step] = self._thread.submit(self._run, step, before, place)
            step += 1

    def take(self, step: int, poll: Poll) -> DrawnStep:
        """Wait for a step's rollout, which is kept; raises what its draw, or `poll`, raises."""
        _wait([self._steps[step]], poll)
        return self._steps[step].result()

    def finish(self, poll: Poll = lambda: None) -> None:
        """Wait until nothing is being drawn; raises what a draw, or `poll`, raises."""
        _wait(self._steps.values(), poll)

    def waiting(self, trained: int) -> dict[int, DrawnStep]:
        """Return, by step, what earlier weights have drawn of steps behind `trained`.

        No later run can draw it again. What the weights after `trained` draw is not among it.
        """
        return {
            step: drawn.result()
            for step, drawn in self._steps.items()
            if step > trained > self._settings.drawn_after(step)
        }

    def busy_s(self, since: float) -> float:
        """Return how long something was drawn since a time of time.perf_counter, which is no
        earlier than the last that was asked for."""
        now = time.perf_counter()
        while self._busy and self._busy[0][1] <= since:
            self._busy.popleft()
        return sum(max(0.0, min(end, now) - max(start, since)) for start, end in [*self._busy])

    def close(self) -> None:
        """Abandon what is being drawn and end the thread. A second call does nothing."""
        self._ended.set()
        self._thread.shutdown()

    def _run(self, step: int, before: Future[DrawnStep] | None, place: int) -> DrawnStep:
        begin = place
        if before is not None:  # by this thread, or restored: it is done
            begin = before.result().begin + before.result().rollout.num_prompts
        if any(gather_objects(self._ended.is_set())):
            raise Stopped("the run has ended")
        busy = [time.perf_counter(), math.inf]
        self._busy.append(busy)
        try:
            rollout = self._draw(step, begin, self._poll)
        finally:
            busy[1] = time.perf_counter()
        return DrawnStep(begin, rollout, busy[1] - busy[0])

    def _poll(self) -> None:
        if self._ended.is_set():
            raise Stopped("the run has ended")


def _wait(draws: Iterable[Future[DrawnStep]], poll: Poll) -> None:
    waits = set(draws)
    while waits:
        done, waits = wait(waits, _TICK_S, FIRST_EXCEPTION)
        for draw in done:
            draw.result()
        poll()
