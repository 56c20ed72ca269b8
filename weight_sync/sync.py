"""WeightSync: all that a recipe knows of how its engine keeps up with its trainer."""

from collections.abc import Mapping
from contextlib import suppress

import torch

from samebit.weight_sync.transports.base import Lease, Transport
from samebit.weight_sync.types import WeightVersion


class WeightSync:
    """Has an engine serve a trainer's versions: `lease`, train, `update`; or `abort` on an error.

    An engine that shares the trainer's memory serves nothing from `lease` to `update`. One with
    memory of its own serves the version before until `update`, and need not know of an `abort`.
    """

    def __init__(self, way: Lease | Transport) -> None:
        self._way = way
        self._step = 0

    def lease(self, step: int) -> None:
        """Say that the weights of `step` are going to be made: memory that is shared is leased."""
        self._step = step
        if isinstance(self._way, Lease):
            self._way.take(step)

    def update(self, params: Mapping[str, torch.Tensor], digest: str) -> WeightVersion:
        """Serve `params`, whose digest this is, as the step that `lease` named.

        Raises WeightSyncError if the engine refused them; it then serves nothing, or the version
        before.
        """
        if isinstance(self._way, Lease):
            return self._way.commit(params, digest)
        self._way.begin(self._step)
        try:
            self._way.send(params)
        except BaseException as error:
            with suppress(RuntimeError):  # the first error is the one to tell
                self._way.abort(str(error))
            raise
        return self._way.commit(digest)

    def abort(self, reason: str) -> None:
        """Give the step up: shared memory, which may hold half of it, is not served any more."""
        if isinstance(self._way, Lease):
            self._way.abort(reason)

    def close(self) -> None:
        """Release sockets and groups."""
        self._way.close()
