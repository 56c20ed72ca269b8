"""Call: what one caller of the engine waits for."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from samebit.rollout.client import Tell
from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.types import Completion, Increment, Request


def uncancelled() -> Future[Any]:
    """A future that those who wait for it cannot cancel; they may only stop waiting."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(eq=False)
class Call:
    """Requests that one caller made at once, and where it gets what comes of them.

    `tell` is called after every step that drew anything for it, before the result is there. `ended`
    is called with how many more samples have ended, while others go on.
    """

    requests: Sequence[Request]
    tell: Tell | None = None
    ended: Callable[[int], object] | None = None
    result: Future[list[list[Completion]]] = field(default_factory=uncancelled)
    samples: list[RunningSample] = field(default_factory=list)
    groups: dict[str, list[Completion]] = field(default_factory=dict)
    """Of the requests that have ended."""
    num_told: dict[RunningSample, int] = field(default_factory=dict)
    """Tokens, of the samples that `tell` was not told the end of."""

    @property
    def num_ended(self) -> int:
        return sum(sample.finish_reason is not None for sample in self.samples)

    def news(self, slots: Slots) -> list[Increment]:
        """What its samples drew since the last time, and which have ended."""
        found = []
        for sample, num_told in list(self.num_told.items()):
            token_ids, logprobs, thresholds = slots.drawn(sample, num_told)
            wanted = sample.request.params.logprobs
            if token_ids or sample.finish_reason is not None:
                found.append(
                    Increment(
                        request_id=sample.request.request_id,
                        sample_id=sample.sample_id,
                        token_ids=tuple(token_ids),
                        logprobs=tuple(logprobs) if wanted else (),
                        finish_reason=sample.finish_reason,
                        version_spans=tuple(sample.spans),
                        thresholds=tuple(thresholds) if wanted else (),
                    )
                )
            self.num_told[sample] += len(token_ids)
            if sample.finish_reason is not None:
                del self.num_told[sample]
        return found
