"""Lockstep: tensor parallel ranks that take what rank 0 decides, step by step.

All ranks plan alike from the same requests in the same order. Called alike (SPMD), they need to
tell each other nothing. Concurrent callers reach each rank at another moment: then rank 0 leads,
and before each step it tells the others what it did since the last one.
"""

from samebit.kernels.reduce import RankGroup
from samebit.rollout.messages import RankMessage, of_plain, to_plain
from samebit.weight_sync.objects import gather_objects


class Lockstep:
    """What this rank says to the others, or hears from rank 0."""

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._said: list[RankMessage] = []
        self.leads = False
        self.failure = ""
        """What the last step raised on this rank."""
        self._broken = ""

    def require_one_order(self) -> None:
        """Raise RuntimeError where requests may reach the ranks in different orders."""
        if self._ranks.size > 1 and not self.leads:
            raise RuntimeError(
                f"concurrent callers of {self._ranks.size} tensor parallel ranks need "
                "Engine.leading on rank 0 and Engine.follow on the others"
            )

    def begin(self, leads: bool) -> None:
        """From here on rank 0 leads, and the others hear it; alone it has nobody to tell.

        Raises RuntimeError for another rank that would lead, or rank 0 that would not.
        """
        if leads != (self._ranks.rank == 0):
            raise RuntimeError(f"rank {self._ranks.rank} cannot {'lead' if leads else 'follow'}")
        self.leads, self.failure, self._said = leads and self._ranks.size > 1, "", []

    def say(self, message: RankMessage) -> None:
        """Have the others do the same before their next step."""
        if self.leads:
            self._said.append(message)

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
        own = self.failure, [to_plain(message) for message in self._said]
        self.failure, self._said = "", []
        try:
            heard = gather_objects(own, self._ranks.group)
            failures = {rank: failure for rank, (failure, _) in enumerate(heard) if failure}
            if 0 < len(failures) < len(heard):
                raise RuntimeError(f"a step failed on some ranks, not on all: {failures}")
        except RuntimeError as error:
            self._broken = str(error)
            raise
        return [of_plain(message) for message in heard[0][1]]
