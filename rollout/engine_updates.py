"""EngineUpdates: an engine's models, and their updates as RL frameworks make them."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from torch import Tensor

from samebit.rollout.device import on_device
from samebit.rollout.engine_update_groups import EngineUpdateGroups
from samebit.rollout.open_update import OpenUpdate, Way
from samebit.rollout.runtime.hf_weights import HFWeights
from samebit.rollout.runtime.served_draft import ServedDraft
from samebit.rollout.runtime.weight_control import ServedModel
from samebit.rollout.values import as_integer, as_list, shown
from samebit.rollout.weight_arguments import (
    as_names,
    as_pairs,
    as_shapes,
    as_step,
    as_weight_version,
    is_flattened,
)
from samebit.weight_sync.buckets import cut_flat, flat_metas
from samebit.weight_sync.session import SessionState
from samebit.weight_sync.types import WeightSyncError, WeightVersion
from samebit.weight_sync.update_group import UpdateGroup

SELECTORS = ("all", "target", "draft")
DRAFT = "draft."
"""What names of a draft's tensors begin with, where those of the target may stand beside them."""


class EngineUpdates(EngineUpdateGroups):
    """What models an engine serves, each with a version of its own, and how frameworks update them.

    The target is what draws; the draft is what guesses, where there is one. An update names what it
    is of, and touches nothing else.
    """

    draft_control: ServedDraft | None = None
    _num_opened = 0
    _num_receiving = 0

    def served(self, selector: str = "target") -> ServedModel:
        """The model "target" or "draft": a WeightSink, which transports of this process update.

        Raises ValueError for another selector, and WeightSyncError for a draft where there is none.
        """
        if selector == "target":
            return self.weight_control
        if selector != "draft":
            known = "target, draft"
            raise ValueError(f"selector {shown(selector)} is unknown; use one of {known}")
        if self.draft_control is None:
            raise WeightSyncError("selector 'draft': no draft model is served, the target alone")
        return self.draft_control

    def begin_weight_update(
        self,
        selector: str = "all",
        step: int | None = None,
        group_names: Sequence[str] | None = None,
    ) -> int:
        """Open a session for a full update to `step`, by default the next one; its number.

        The engine has to be idle or paused. selector: the models that the update is of, "target",
        "draft" or "all". The Hugging Face names of the draft's tensors begin with "draft."; an
        update of "all" to which none of them comes leaves the draft as it is.

        The session is whose it is: its tensors come by one group, or all from this process, as the
        first of them did; group_names: by several groups, as of a trainer's pipeline stages. Where
        other trainers of this process may call, give the number to every call of the session. A
        session whose trainer has ended (all the groups that it may have come by are lost, or the
        engine has left them) is broken off by the next begin, of whatever update, and so is one of
        which a tensor was refused.

        Raises ValueError for an unknown selector or group, and WeightSyncError for "draft" where
        none is served, another session, or a stale step.
        """
        _require_selector(selector)
        groups = as_list(group_names or [], "group_names", "a list of names of groups")
        model = self.served("target" if selector == "all" else selector)
        given, step = step, model.version.step + 1 if step is None else as_step(step)
        self._num_opened += 1  # whatever comes of it: on all ranks the same

        def require_free() -> None:
            for name in groups:
                self._update_group(name)
            if self._num_receiving:
                raise WeightSyncError(
                    "tensors of a session that was broken off are being received; have the engine "
                    "leave their group, or wait for it to miss them"
                )

        self._settle_alike("begin_weight_update", require_free)
        for other in self._models:
            if other is not model and other.session.is_open:
                tag = other.session.tag
                raise WeightSyncError(f"an update of {tag} is under way; end it first")
        model.begin(step)
        senders = tuple(map(self._update_group, groups))
        known = tuple(group for group in self._update_groups.values() if not group.is_lost)
        opened = OpenUpdate(
            *(self._num_opened, selector, step, given is not None, senders or known, bool(senders))
        )
        opened.add(model)
        self._opened = opened
        return opened.number

    def end_weight_update(
        self,
        digest: str | None = None,
        draft_digest: str | None = None,
        session: int | None = None,
    ) -> WeightVersion:
        """Serve what came in the session; the version has the digest of the weights themselves.

        digest: the sender's, to be compared; where the update brought both models it is the
        target's, as is the version, and draft_digest the other's. session: its number, which has to
        be given if other calls gave it. Raises WeightSyncError, and serves nothing of a model, if
        tensors of it are missing or not finite, or if anything of it was refused in the session; a
        draft that is refused is not guessed by. An update that begin_weight_update has not begun
        goes on, and the call is refused.
        """
        opened = self._require_opened(session)
        if draft_digest is not None and len(opened.models) < 2:
            raise ValueError("draft_digest is given, and the update has not brought both models")
        self._opened = None
        first, *others = opened.models
        try:
            version = first.commit(digest)
        except BaseException:
            for draft in others:
                with suppress(WeightSyncError):  # the first error is the one to tell
                    draft.commit(draft_digest)
            raise
        for draft in others:
            draft.commit(draft_digest)
        return version

    def abort_weight_update(
        self, reason: str = "abort_weight_update was called", session: int | None = None
    ) -> bool:
        """Break off the session of begin_weight_update; whether there was one.

        Nothing is served then until a full update commits. A trainer that was started again may
        call it before its first update, whatever has become of the last one; every tensor parallel
        rank calls it. session: the number of the one that is meant; WeightSyncError if that is
        not open.
        """
        if not isinstance(reason, str):
            raise ValueError(f"reason is {shown(reason)}; it must be a text")
        if session is not None:
            self._require_opened(session)
        if (opened := self._opened) is None:
            return False

        def abort() -> None:
            self.weight_control.gate.require_alike("abort_weight_update")
            self._opened = None
            opened.abort(reason)

        self.weight_control.gate.between_steps(abort)
        return True

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str = "weight_update_group",
        flush_cache: bool = True,
        load_format: str | None = None,
        selector: str = "all",
        weight_version: str | int | None = None,
        session: int | None = None,
    ) -> None:
        """Take whole tensors, by Hugging Face names, that rank 0 of the group broadcasts in order.

        Within a session, whose end drops cached prefixes, whatever flush_cache says. A tensor that
        does not fit is refused before anything is received, and nothing is ever cast. What rank 0
        sends has to be what it tells: a digest given to end_weight_update proves it. load_format:
        "flattened_bucket" for the bytes of all of them, one behind another, in one broadcast.

        selector: of a session of "all" or of the same, whose the tensors are; the names of one of
        "draft" need no "draft.". weight_version: the step that the session is to commit, as a
        number or its text. session: its number.

        Raises WeightSyncError for a tensor that does not fit, without a session of that number, for
        another way than its tensors come by, or if the group has lost a member; ValueError for
        another selector or weight_version than the session's. A tensor that does not fit, and a
        lost member, break the update off, and the group is closed: what its rank 0 sends next would
        be taken for something else. What is refused otherwise leaves the update as it was.
        """
        flattened = is_flattened(load_format)
        names, shapes = as_names(names), as_shapes(shapes)
        dtypes = [str(dtype) for dtype in as_list(dtypes, "dtypes", "a list of dtypes")]
        self._require_opened(session)
        group = self._update_group(group_name)
        opened = self._admit(group, selector, weight_version, session)
        with self._breaking(opened, group), on_device(self.device):
            owners = self._fitting(opened, names, dtypes, shapes, selector)
            broadcasts = group.broadcasts()
            if flattened and owners:
                metas = flat_metas(names, dtypes, shapes)
                flat = broadcasts.receive_bytes(metas[-1].offset + metas[-1].num_bytes)
                for (weights, name), tensor in zip(owners, cut_flat(flat, metas), strict=True):
                    weights.take(name, tensor)
            else:
                for weights, name in owners:
                    weights.take(name, broadcasts)
            broadcasts.wait()

    def update_weights_from_tensor(
        self,
        named_tensors: Sequence[tuple[str, Tensor]],
        load_format: str | None = None,
        flush_cache: bool = True,
        selector: str = "all",
        weight_version: str | int | None = None,
        session: int | None = None,
    ) -> None:
        """Copy whole tensors, by Hugging Face names, into place; in a session, as above.

        load_format: "flattened_bucket" for named_tensors that are a mapping of "flattened_tensor",
        one flat tensor, and "metadata", of each tensor in it its name, shape, dtype, start_idx and
        end_idx. For all parameters by their engine names, at once and without a session:
        `copy_weights`.
        """
        named = as_pairs(named_tensors, is_flattened(load_format))
        opened = self._admit(None, selector, weight_version, session)
        with self._breaking(opened):
            tensors = [tensor for _, tensor in named]
            names, dtypes = [name for name, _ in named], [str(t.dtype) for t in tensors]
            shapes = [tuple(tensor.shape) for tensor in tensors]
            owners = self._fitting(opened, names, dtypes, shapes, selector)
            for (weights, name), tensor in zip(owners, tensors, strict=True):
                weights.take(name, tensor.detach())

    # -- internals -------------------------------------------------------------------------------

    @property
    def _models(self) -> list[ServedModel]:
        draft = self.draft_control
        return [self.weight_control] if draft is None else [self.weight_control, draft]

    @property
    def _updating(self) -> list[ServedModel]:
        """Those that an update is under way of, and nothing of it was refused here."""
        return [m for m in self._models if m.session.state is SessionState.UPDATING]

    def _require_opened(self, session: int | None) -> OpenUpdate:
        """The session that begin_weight_update has opened, for a call that gives this number."""
        opened = self._opened
        if opened is not None and any(map(opened.holds, opened.models)):
            opened.require(None if session is None else as_integer(session, "session"))
            return opened
        if self._updating:
            raise WeightSyncError(
                "no update is under way that begin_weight_update has begun, but one of a transport"
            )
        state = self.weight_control.session.state.value
        raise WeightSyncError(
            f"no update is under way (state: {state}); call begin_weight_update first"
        )

    def _admit(
        self, way: Way, selector: str, weight_version: str | int | None, session: int | None
    ) -> OpenUpdate:
        """The session, for a call that brings tensors of it; or refuse that call alone."""
        version = as_weight_version(weight_version)
        _require_selector(selector)
        opened = self._require_opened(session)
        if refusal := opened.refusal:
            raise WeightSyncError(
                f"the update was refused: {refusal}; end_weight_update, then begin_weight_update"
            )
        if selector not in ("all", opened.selector) and opened.selector != "all":
            raise ValueError(
                f"selector is '{selector}', and the session of begin_weight_update is of "
                f"'{opened.selector}'"
            )
        if selector != "all":
            self.served(selector)
        opened.admit(way, version, session is not None)
        return opened

    def _weak_end_lost_update(self) -> Callable[..., None]:
        """_end_lost_update for what the engine itself holds: no cycle."""
        held = weakref.ref(self)

        def end_lost_update(counts_left: bool = True) -> None:
            if (engine := held()) is not None:
                engine._end_lost_update(counts_left)

        return end_lost_update

    def _owner(self, name: str, selector: str = "all") -> tuple[ServedModel, str]:
        """Whose tensor it is, and its name there."""
        draft = self.draft_control
        is_of_draft = selector == "draft" or (selector == "all" and name.startswith(DRAFT))
        if draft is not None and is_of_draft:
            return draft, name.removeprefix(DRAFT)
        return self.weight_control, name

    def _fitting(
        self,
        opened: OpenUpdate,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        selector: str,
    ) -> list[tuple[HFWeights, str]]:
        """Whose each tensor is, with its name there. What does not fit breaks the update."""
        refuse = opened.models[0].session.refuse
        if not len(names) == len(dtypes) == len(shapes):
            refuse(
                f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes; every tensor "
                "has one of each"
            )
        weights, found = dict[str, HFWeights](), list[tuple[HFWeights, str]]()
        for given, dtype, shape in zip(names, dtypes, shapes, strict=True):
            model, name = self._owner(given, selector)
            if model is self.draft_control and opened.selector == "all":
                self._begin_draft(opened, model)
            if not opened.holds(model):
                refuse(
                    f"{given} is of another model than the update: begin_weight_update with "
                    f"selector 'all' takes both, and names of the draft's begin with '{DRAFT}'"
                )
            own = weights.setdefault(model.session.tag, HFWeights(model.session))
            own.require_fit(name, dtype, shape)
            found.append((own, name))
        return found

    @staticmethod
    def _begin_draft(opened: OpenUpdate, draft: ServedModel) -> None:
        """Have the draft join an update of all with the first of its tensors that comes."""
        if draft not in opened.models:
            # Its own updates may have taken it further than the target's step.
            draft.begin(opened.step, may_go_back=True)
            opened.add(draft)

    @contextmanager
    def _breaking(self, opened: OpenUpdate, group: UpdateGroup | None = None) -> Iterator[None]:
        """Whatever ends the block early breaks the session's update, and the group, if they are
        still there: another thread may have ended both meanwhile."""
        self._num_receiving += 1
        try:
            yield
        except BaseException as error:
            if group is not None and self._update_groups.get(group.name) is group:
                del self._update_groups[group.name]
                group.leave(is_broken=True)
            for model in opened.models:
                if opened.holds(model) and not model.session.is_refused:
                    with suppress(WeightSyncError):  # the first error is the one to tell
                        model.session.refuse(str(error) or repr(error))
            raise
        finally:
            self._num_receiving -= 1


def _require_selector(selector: str) -> None:
    if selector not in SELECTORS:
        known = ", ".join(SELECTORS)
        raise ValueError(f"selector {shown(selector)} is unknown; use one of {known}")
