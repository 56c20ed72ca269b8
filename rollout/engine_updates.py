"""EngineUpdates: an engine's models, and their updates as RL frameworks make them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from samebit.kernels.reduce import RankGroup
from samebit.rollout.device import on_device
from samebit.rollout.runtime.hf_weights import HFWeights
from samebit.rollout.runtime.served_draft import ServedDraft
from samebit.rollout.runtime.weight_control import ServedModel, WeightControl
from samebit.rollout.values import as_integer, as_list, as_number, shown
from samebit.rollout.weight_arguments import as_names, as_pairs, as_shapes, as_step, require_plain
from samebit.weight_sync.session import SessionState
from samebit.weight_sync.types import WeightSyncError, WeightVersion
from samebit.weight_sync.update_group import Broadcasts, join_update_group, leave_update_group

SELECTORS = ("all", "target", "draft")
DRAFT = "draft."
"""What names of a draft's tensors begin with, where those of the target may stand beside them."""


class EngineUpdates:
    """What models an engine serves, each with a version of its own, and how frameworks update them.

    The target is what draws; the draft is what guesses, where there is one. An update names what it
    is of, and touches nothing else.
    """

    weight_control: WeightControl
    draft_control: ServedDraft | None = None
    device: torch.device
    ranks: RankGroup
    _begun: tuple[ServedModel, ...] = ()
    """Those that the session of begin_weight_update is of, the target first."""
    _step_of_all: int | None = None
    """Of an open update of "all": the draft joins it with the first of its tensors that comes."""

    @cached_property
    def _update_groups(self) -> dict[str, tuple[ProcessGroup, float]]:
        """By name, with the seconds that a member may stay away."""
        return {}

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

    def begin_weight_update(self, selector: str = "all", step: int | None = None) -> None:
        """Open a session for a full update to `step`, by default the next one.

        The engine has to be idle or paused. selector: the models that the update is of, "target",
        "draft" or "all". The Hugging Face names of the draft's tensors begin with "draft."; an
        update of "all" to which none of them comes leaves the draft as it is. Raises ValueError for
        an unknown selector, and WeightSyncError for "draft" where none is served, another session,
        or a stale step.
        """
        if selector not in SELECTORS:
            known = ", ".join(SELECTORS)
            raise ValueError(f"selector {shown(selector)} is unknown; use one of {known}")
        model = self.served("target" if selector == "all" else selector)
        for other in self._updating:
            if other is not model:
                tag = other.session.tag
                raise WeightSyncError(f"an update of {tag} is under way; end it first")
        step = model.version.step + 1 if step is None else as_step(step)
        model.begin(step)
        self._begun, self._step_of_all = (model,), step if selector == "all" else None

    def end_weight_update(
        self, digest: str | None = None, draft_digest: str | None = None
    ) -> WeightVersion:
        """Serve what came in the session; the version has the digest of the weights themselves.

        digest: the sender's, to be compared; where the update brought both models it is the
        target's, as is the version, and draft_digest the other's. Raises WeightSyncError, and
        serves nothing of a model, if tensors of it are missing or not finite, or if anything of it
        was refused in the session; a draft that is refused is not guessed by.
        """
        if draft_digest is not None and len(self._begun) < 2:
            raise ValueError("draft_digest is given, and the update has not brought both models")
        opened, self._begun, self._step_of_all = self._begun, (), None
        if len(opened) < 2:
            return (*opened, self.weight_control)[0].commit(digest)
        target, draft = opened
        try:
            version = target.commit(digest)
        except BaseException:
            with suppress(WeightSyncError):  # the first error is the one to tell
                draft.commit(draft_digest)
            raise
        draft.commit(draft_digest)
        return version

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = "weight_update_group",
        backend: str = "nccl",
        timeout_s: float = 600.0,
        secret: str | None = None,
    ) -> None:
        """Join a group whose rank 0, at the address, broadcasts weights; see join_update_group.

        This engine's ranks are rank_offset and the next ones. timeout_s: how long a member may stay
        away, now and in every update. Raises ValueError for a name in use or a bad backend.
        """
        rank_offset = as_integer(rank_offset, "rank_offset")
        world_size = as_integer(world_size, "world_size")
        master_port = as_integer(master_port, "master_port")
        timeout_s = as_number(timeout_s, "timeout_s")
        if rank_offset < 1 or rank_offset + self.ranks.size > world_size:
            raise ValueError(
                f"rank_offset is {rank_offset} for {self.ranks.size} ranks of world_size "
                f"{world_size}; it must be at least 1, behind the trainer, and all must fit"
            )
        if not isinstance(group_name, str):
            raise ValueError(f"group_name is {shown(group_name)}; it must be a text")
        if group_name in self._update_groups:
            raise ValueError(f"group '{group_name}' is there; destroy_weights_update_group first")
        if backend == "nccl" and self.device.type == "cpu":
            raise ValueError("backend 'nccl' needs a GPU; for an engine on the CPU use 'gloo'")
        rank = rank_offset + self.ranks.rank
        place = master_address, master_port, rank, world_size
        group = join_update_group(*place, group_name, backend, timeout_s, secret)
        self._update_groups[group_name] = group, timeout_s
        for model in self._models:
            model.session.meet_sender()

    def destroy_weights_update_group(self, group_name: str = "weight_update_group") -> None:
        """Leave a group. ValueError if there is none of that name."""
        leave_update_group(self._update_group(group_name)[0])
        del self._update_groups[group_name]

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str = "weight_update_group",
        flush_cache: bool = True,
        load_format: str | None = None,
    ) -> None:
        """Take whole tensors, by Hugging Face names, that rank 0 of the group broadcasts in order.

        Within a session, whose end drops cached prefixes, whatever flush_cache says. A tensor that
        does not fit is refused before anything is received, and nothing is ever cast. What rank 0
        sends has to be what it tells: a digest given to end_weight_update proves it. Raises
        WeightSyncError for that, without a session, or if the group has lost a member. Then the
        update has broken off, and the group is closed: what its rank 0 sends next would be taken
        for something else.
        """
        require_plain(load_format)
        names, shapes = as_names(names), as_shapes(shapes)
        dtypes = [str(dtype) for dtype in as_list(dtypes, "dtypes", "a list of dtypes")]
        self._require_session()
        group, timeout_s = self._update_group(group_name)
        with self._breaking(group_name), on_device(self.device):
            owners = self._fitting(names, dtypes, shapes)
            broadcasts = Broadcasts(group, timeout_s)
            for weights, name in owners:
                weights.take(name, broadcasts)
            broadcasts.wait()

    def update_weights_from_tensor(
        self,
        named_tensors: Sequence[tuple[str, Tensor]],
        load_format: str | None = None,
        flush_cache: bool = True,
    ) -> None:
        """Copy whole tensors, by Hugging Face names, into place; in a session, as above.

        For all parameters by their engine names, at once and without a session: `copy_weights`.
        """
        require_plain(load_format)
        named = as_pairs(named_tensors)
        self._require_session()
        with self._breaking():
            tensors = [tensor for _, tensor in named]
            names, dtypes = [name for name, _ in named], [str(t.dtype) for t in tensors]
            owners = self._fitting(names, dtypes, [tuple(tensor.shape) for tensor in tensors])
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

    def _require_session(self) -> None:
        if not self._updating:
            HFWeights(self.weight_control.session).require_session()

    def _owner(self, name: str) -> tuple[ServedModel, str]:
        """Whose tensor it is, and its name there."""
        if self.draft_control is not None and name.startswith(DRAFT):
            return self.draft_control, name.removeprefix(DRAFT)
        return self.weight_control, name

    def _fitting(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> list[tuple[HFWeights, str]]:
        """Whose each tensor is, with its name there. What does not fit breaks the update."""
        refuse = self._updating[0].session.refuse
        if not len(names) == len(dtypes) == len(shapes):
            refuse(
                f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes; every tensor "
                "has one of each"
            )
        weights, found = dict[str, HFWeights](), list[tuple[HFWeights, str]]()
        for given, dtype, shape in zip(names, dtypes, shapes, strict=True):
            model, name = self._owner(given)
            if model is self.draft_control and self._step_of_all is not None:
                # Its own updates may have taken it further than the target's step.
                model.begin(self._step_of_all, may_go_back=True)
                self._begun, self._step_of_all = (*self._begun, model), None
            if model not in self._updating:
                refuse(
                    f"{given} is of another model than the update: begin_weight_update with "
                    f"selector 'all' takes both, and names of the draft's begin with '{DRAFT}'"
                )
            own = weights.setdefault(model.session.tag, HFWeights(model.session))
            own.require_fit(name, dtype, shape)
            found.append((own, name))
        return found

    @contextmanager
    def _breaking(self, group_name: str | None = None) -> Iterator[None]:
        """Whatever ends the block early breaks the session's update, and the group."""
        try:
            yield
        except BaseException as error:
            if group_name is not None:
                leave_update_group(self._update_groups.pop(group_name)[0], is_broken=True)
            for model in self._updating:
                with suppress(WeightSyncError):  # the first error is the one to tell
                    model.session.refuse(str(error) or repr(error))
            raise

    def _leave_update_groups(self) -> None:
        while self._update_groups:
            leave_update_group(self._update_groups.popitem()[1][0])

    def _update_group(self, group_name: str) -> tuple[ProcessGroup, float]:
        if group_name not in self._update_groups:
            known = ", ".join(self._update_groups) or "none"
            raise ValueError(
                f"no weight group '{group_name}' (there are: {known}); call "
                "init_weights_update_group first"
            )
        return self._update_groups[group_name]
