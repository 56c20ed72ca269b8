"""The processes of a trainer as an update sees them: the first has the engines, and leads."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch.distributed as dist

from samebit.weight_sync.failures import cause, may_pass
from samebit.weight_sync.meeting import LOOPBACK, is_loopback, is_on_one_machine, own_address
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.types import LostMemberError, WeightSyncError


@dataclass(frozen=True)
class TrainerRanks:
    """This process among those that train together, all of which make the same calls; alone by
    default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_world(cls) -> Self:
        """Those of torch's default group, if there is one."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def told[T](self, make: Callable[[], T]) -> T:
        """Return what `make`, which the first process alone runs, gives there: a plain value.

        What it raises there the others raise as `failed` gives it.
        """
        result = self.agreed(make if self.rank == 0 else lambda: None)
        return self._gather(result)[0]  # type: ignore[return-value]

    def agreed[T](self, call: Callable[[], T]) -> T:
        """Return what a call gives that all make; where one fails, all raise, as `failed` says."""
        result: T | None = None
        own: Exception | None = None
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - the others are told first
            own = error
        if (failure := self.failed(own)) is not None:
            raise failure
        return result  # type: ignore[return-value]

    def any(self, own: bool) -> bool:
        """Say whether it is so on any of them."""
        return True in self._gather(own)

    def failed(self, own: Exception | None) -> Exception | None:
        """Return this process's failure, or else that of the first process that has one.

        Of several the `cause` counts. That of another process is a WeightSyncError, and a
        LostMemberError if it may pass.
        """
        said = "" if own is None else str(own) or repr(own)
        failure = cause(self._gather((said, own is not None and may_pass(own))))
        if failure is None:
            return None
        words, passes = failure
        if own is not None and may_pass(own) == passes:
            return own
        return (LostMemberError if passes else WeightSyncError)(words)

    def address(self) -> str:
        """Return where the first process is, as the others reach it: the loopback on one machine.

        On the others: anything.
        """
        if self.size == 1 or is_on_one_machine():
            return LOOPBACK
        port = int(os.environ["MASTER_PORT"])
        own = own_address(os.environ["MASTER_ADDR"], port)
        far = [address for address in self._gather(own)[1:] if not is_loopback(address)]
        return own_address(far[0], port) if far else LOOPBACK

    def _gather[T](self, value: T) -> list[T]:
        return [value] if self.size == 1 else gather_objects(value)


ALONE = TrainerRanks()
