"""OpenUpdate: a session of begin_weight_update, and whose calls belong to it."""

from collections.abc import Collection
from dataclasses import dataclass, field

from samebit.rollout.runtime.weight_control import ServedModel
from samebit.weight_sync.types import WeightSyncError
from samebit.weight_sync.update_group import UpdateGroup

type Way = UpdateGroup | None
"""What brings tensors: a group, or a caller in this process."""


@dataclass
class OpenUpdate:
    """One session, from its begin to its end or abort.

    What one trainer begins no other may fill or end. The way that the first tensors come is the
    only one, unless the groups were named at the start; and if a call gave the session's number
    all have to.
    """

    number: int
    selector: str
    step: int
    is_step_given: bool
    """Whether begin_weight_update or a weight_version has said the step, which then is the one."""
    senders: tuple[UpdateGroup, ...]
    """Those by whose rank 0s it may come; empty if that is not known, or it comes without."""
    are_named: bool
    """Whether the trainer has said that it comes by all of them."""
    _begun: list[tuple[ServedModel, int]] = field(default_factory=list)
    """With the number of its update."""
    _has_come: bool = False
    _is_numbered: bool = False

    @property
    def models(self) -> list[ServedModel]:
        """What the update brings, the target first."""
        return [model for model, _ in self._begun]

    def add(self, model: ServedModel) -> None:
        """Take in a model whose update has just begun."""
        self._begun.append((model, model.session.num_begun))

    def holds(self, model: ServedModel) -> bool:
        """Whether the model's update is this session's, and has not ended."""
        session = model.session
        return session.is_open and (model, session.num_begun) in self._begun

    @property
    def refusal(self) -> str:
        """What this rank has refused of it, "" if nothing."""
        refused = [m.session for m in self.models if self.holds(m) and m.session.is_refused]
        return refused[0].reason if refused else ""

    def loss(self, joined: Collection[UpdateGroup], counts_left: bool) -> str:
        """Who is not there any more that it was to come by, "" if that cannot be said.

        joined: the groups that the engine is in; counts_left: whether the others are lost.
        """
        gone = [
            group for group in self.senders if (group.is_lost if group in joined else counts_left)
        ]
        if not gone or not (self.are_named or len(gone) == len(self.senders)):
            return ""
        return "the trainer that sent it is gone"

    def require(self, number: int | None) -> None:
        """Raise WeightSyncError for a call that says another session, or none where others have."""
        if number is None and self._is_numbered:
            raise WeightSyncError(
                f"the calls of session {self.number} give its number, and this one does not: it is "
                "not of the trainer that began it"
            )
        if number not in (None, self.number):
            raise WeightSyncError(
                f"session {number} is not open: session {self.number}, of an update to step "
                f"{self.step}, is"
            )

    def admit(self, way: Way, step: int | None, is_numbered: bool) -> None:
        """Take in a call that brings tensors: its way, the step that its weight_version says, and
        whether it gave the session's number, are from here on the session's.

        Raises WeightSyncError for tensors that come another way, and ValueError for another step;
        then the session is as it was.
        """
        self._require_way(way)
        self._name_step(step)
        if not self.are_named:
            self.senders = () if way is None else (way,)
        self._has_come = True
        self._is_numbered |= is_numbered

    def _require_way(self, way: Way) -> None:
        own: tuple[Way, ...] = self.senders or (None,)
        if (self.are_named or self._has_come) and way not in own:
            raise WeightSyncError(
                f"the tensors of the session that is open, to step {self.step}, come "
                f"{_told(own)}, and these {_told([way])}: they are not of the trainer that began "
                "it; end_weight_update or abort_weight_update first"
            )

    def _name_step(self, step: int | None) -> None:
        if step is None:
            return
        if self.is_step_given and step != self.step:
            raise ValueError(
                f"weight_version is {step}, and the session of begin_weight_update is of step "
                f"{self.step}; an update has one"
            )
        for model in self.models:
            model.session.rename(step, may_go_back=model is not self.models[0])
        self.step, self.is_step_given = step, True

    def abort(self, reason: str) -> None:
        """Break off what has not ended of it, on all ranks."""
        for model in self.models:
            if self.holds(model):
                model.session.abort_alike(reason)


def _told(ways: Collection[Way]) -> str:
    names = [f"'{way.name}'" for way in ways if way is not None]
    return f"by the group {' or '.join(names)}" if names else "from this process"
