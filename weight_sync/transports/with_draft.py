"""WithDraft: a target and its draft, each in its own way, as one."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from samebit.weight_sync.transports.base import WeightSync
from samebit.weight_sync.types import WeightVersion


class DraftSource(Protocol):
    """Who makes versions of a draft; its trainer is one."""

    step: int
    """The draft's own optimizer step that made the present weights."""
    params: Mapping[str, Tensor]

    def digest(self) -> str:
        """weights_digest of the present weights."""


class WithDraft(WeightSync):
    """Has an engine serve a trainer's versions and those of its draft, under the same steps.

    The target goes first, and a draft that has not been trained since does not go at all. Each
    update is whole or refused by itself: what becomes of the draft's can change no token.
    """

    def __init__(self, target: WeightSync, draft: WeightSync, source: DraftSource) -> None:
        self._target, self._draft, self._source = target, draft, source
        self._step = 0
        self._held: int | None = None
        """The draft's own step that the engine was last brought to; None: to none."""

    def lease(self, step: int) -> None:
        """See WeightSync.lease; a draft is never leased: what is served of it is a copy."""
        self._target.lease(step)
        self._step = step

    def update(self, params: Mapping[str, Tensor], digest: str) -> WeightVersion:
        """Serve the target's `params`, then the draft's, as the step that `lease` named."""
        version = self._target.update(params, digest)
        if self._held != self._source.step:
            self._draft.lease(self._step)
            self._draft.update(self._source.params, self._source.digest())
            self._held = self._source.step
        return version

    def give_up(self, reason: str) -> None:
        """See WeightSync.give_up; the draft stays as it is."""
        self._target.give_up(reason)

    def close(self) -> None:
        """Let go of what either holds."""
        self._draft.close()
        self._target.close()
