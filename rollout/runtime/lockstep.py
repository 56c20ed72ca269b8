"""Lockstep: tensor parallel ranks that take what rank 0 decides, step by step.

All ranks plan alike from the same requests in the same order. Called alike (SPMD), they need to
tell each other nothing. Concurrent callers reach each rank at another moment: then rank 0 leads,
and before each step it tells the others what it did since the last one.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from samebit.kernels.reduce import RankGroup
from samebit.rollout.messages import RankMessage, of_plain, to_plain
from samebit.weight_sync.objects import gather_objects


class Lockstep:
    """What this rank says to the others, or hears from rank 0."""

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._said: list[RankMessage] = []
        self.leads = False
        self._failures = ["", ""]
        """What a step raised on this rank: to be told next, and after that."""
        self._failed_at = 0.0
        self._is_telling = False
        self._broken = ""

    def require_one_order(self) -> None:
        """Raise RuntimeError where requests may reach the ranks in different orders."""
        if self._ranks.size > 1 and not self.leads:
            raise RuntimeError(
                f"concurrent callers of {self._ranks.size} tensor parallel ranks need "
                "Engine.leading on rank 0 and Engine.follow on the others"
            )

    def require_alike(self, what: str) -> None:
        """Raise RuntimeError for what all ranks have to call, while rank 0 alone is called."""
        if self.leads:
            raise RuntimeError(f"{what} is for every rank: call it after the block Engine.leading")

    def begin(self, leads: bool) -> None:
        """From here on rank 0 leads, and the others hear it; alone it has nobody to tell.

        Raises RuntimeError for another rank that would lead, or rank 0 that would not.
        """
        if leads != (self._ranks.rank == 0):
            raise RuntimeError(f"rank {self._ranks.rank} cannot {'lead' if leads else 'follow'}")
        self.leads = leads and self._ranks.size > 1
        self._failures, self._said = ["", ""], []

    def say(self, message: RankMessage) -> None:
        """Have the others do the same before their next step."""
        if self.leads:
            self._said.append(message)

    @contextmanager
    def alike(self, message: RankMessage) -> Iterator[None]:
        """In the block all ranks make one call, which the others are told of by this message: what
        is for every rank is allowed, and nothing of it is said."""
        self.say(message)
        self.meet()
        leads, self.leads = self.leads, False
        try:
            yield
        finally:
            self.leads = leads

    def failed(self, error: BaseException) -> None:
        """Have the ranks compare what a step, or a drain, raised on each of them.

        What rank 0 finds after it said anything, such as Drain, the others find once they hear it.
        One that was interrupted is in the midst of a step, and meets nobody any more.
        """
        self._failures[bool(self._said)] = repr(error)
        self._failed_at = time.monotonic()
        if not isinstance(error, Exception):
            self._broken = repr(error)

    @property
    def untold_s(self) -> float:
        """Seconds for which the other ranks have not heard what a step raised here; 0: nothing."""
        told = not any(self._failures) and not self._is_telling
        return 0.0 if told else time.monotonic() - self._failed_at

    def meet(self) -> None:
        """Tell what was said, if this rank leads."""
        if self.leads:
            self.exchange()

    def exchange(self) -> list[RankMessage]:
        """What rank 0 said since the last time.

        Raises RuntimeError, from then on, if a rank is gone or a step failed on some ranks alone.
        """
        if self._broken:
            raise RuntimeError(f"the tensor parallel ranks have parted: {self._broken}")
        failure, later = self._failures
        said, self._failures, self._said = self._said, [later, ""], []
        self._is_telling = bool(failure)
        try:
            own = failure, [to_plain(message) for message in said]
            heard = gather_objects(own, self._ranks.group)
            failures = {rank: failure for rank, (failure, _) in enumerate(heard) if failure}
            if 0 < len(failures) < len(heard):
                raise RuntimeError(f"a step failed on some ranks, not on all: {failures}")
        except BaseException as error:
            self._broken = str(error) or repr(error)
            raise
        finally:
            self._is_telling = False
        return [of_plain(message) for message in heard[0][1]]
