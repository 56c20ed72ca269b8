"""The engine of a rank that takes part in an update, as the update's messages ask for it."""

from collections.abc import Callable, Sequence

from torch import Tensor

from samebit.weight_sync.transports.base import WeightSink
from samebit.weight_sync.transports.peers import View
from samebit.weight_sync.types import ParamMeta, WeightSyncError


class AskedSink:
    """A rank's sink, or none: asked until it refuses; then its refusal stands.

    held: the digest of the version that it held as the update began, "" for a mixture; of no sink
    nothing.
    """

    def __init__(self, sink: WeightSink | None, metas: Sequence[ParamMeta]) -> None:
        """metas: the regions that come."""
        self._sink, self._metas = sink, metas
        self.start()

    def start(self) -> None:
        """Forget the last update's refusal."""
        self.refusal: WeightSyncError | None = None
        self.held: list[str] = []
        self._has_begun = False  # else whatever is under way in the engine is somebody else's

    @property
    def words(self) -> str:
        """Why it refused, "" if it did not."""
        return "" if self.refusal is None else str(self.refusal)

    def refuse(self, reason: str) -> None:
        """Refuse before the engine is asked."""
        self.refusal = WeightSyncError(reason)

    def begin(self, step: int) -> None:
        if self._sink is not None:
            version = self._ask(self._sink.begin, step)
            self._has_begun = self.refusal is None
            self.held = ["" if version is None else version.digest]

    def cancel(self) -> None:
        if self._sink is not None and self._has_begun:
            self._ask(self._sink.cancel)

    def targets(self) -> View:
        """The memory of the regions that come, by region."""
        if self._sink is None:
            return _receives_nothing
        views = self._ask(self._sink.expect, self._metas) or []
        of = dict(zip(map(_place, self._metas), views, strict=False))
        return lambda meta: of[_place(meta)]

    def arrived(self) -> None:
        if self._sink is not None:
            self._ask(self._sink.arrived, self._metas)

    def commit(self, digest: str) -> None:
        """In any case: tensor parallel ranks learn there what others refused."""
        if self._sink is not None:
            try:
                self._sink.commit(digest)
            except WeightSyncError as error:
                self.refusal = self.refusal or error

    def abort(self, reason: str) -> None:
        if self._sink is not None and self._has_begun:
            self._ask(self._sink.abort, reason)

    def _ask[T, *A](self, action: Callable[[*A], T], *args: *A) -> T | None:
        if self.refusal is None:
            try:
                return action(*args)
            except WeightSyncError as error:
                self.refusal = error
        return None


def _receives_nothing(meta: ParamMeta) -> Tensor:
    raise AssertionError(meta)


def _place(meta: ParamMeta) -> tuple[str, tuple[int, ...] | None]:
    return meta.name, meta.start
