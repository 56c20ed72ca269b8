"""EngineUpdateGroups: the groups that RL frameworks' trainers have an engine join."""

from collections.abc import Callable
from functools import cached_property

import torch

from samebit.kernels.reduce import RankGroup
from samebit.rollout.open_update import OpenUpdate
from samebit.rollout.runtime.weight_control import ServedModel, WeightControl
from samebit.rollout.values import as_integer, as_number, shown
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.types import WeightSyncError
from samebit.weight_sync.update_group import UpdateGroup, join_update_group


class EngineUpdateGroups:
    """How an engine joins and leaves them, and what becomes of what a lost one was sending."""

    weight_control: WeightControl
    device: torch.device
    ranks: RankGroup
    _opened: OpenUpdate | None = None
    """The session of begin_weight_update."""

    @cached_property
    def _update_groups(self) -> dict[str, UpdateGroup]:
        """By name."""
        return {}

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
        away, now and in every update. A group of that name whose rank 0 has ended is left first,
        and what it was sending broken off. Raises ValueError for a name in use or a bad backend.
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
        if backend == "nccl" and self.device.type == "cpu":
            raise ValueError("backend 'nccl' needs a GPU; for an engine on the CPU use 'gloo'")

        def require_free() -> None:
            held = self._update_groups.get(group_name)
            if held is not None and not held.is_lost:
                raise ValueError(
                    f"group '{group_name}' is there; destroy_weights_update_group first"
                )

        self._settle_alike("init_weights_update_group", require_free, counts_left=False)
        if (held := self._update_groups.pop(group_name, None)) is not None:
            held.leave(is_broken=True)
        rank = rank_offset + self.ranks.rank
        place = master_address, master_port, rank, world_size
        group = join_update_group(*place, group_name, backend, timeout_s, secret)
        self._update_groups[group_name] = group
        for model in self._models:
            model.session.meet_sender()

    def destroy_weights_update_group(self, group_name: str = "weight_update_group") -> None:
        """Leave a group. ValueError if there is none of that name.

        What has come by it stays, and the session can be ended; a next begin breaks that off.
        """
        group = self._update_group(group_name)
        del self._update_groups[group_name]
        group.leave(is_broken=group.is_lost)

    # -- internals -------------------------------------------------------------------------------

    @property
    def _models(self) -> list[ServedModel]:
        """What the engine serves, the target first."""
        raise NotImplementedError

    def _settle_alike(
        self, what: str, check: Callable[[], object], counts_left: bool = True
    ) -> None:
        """Pass a check on every rank, or on none, and end what nobody is left to end. Raises what
        the check raises on this rank, WeightSyncError for what it raises on another."""

        def settle() -> None:
            self.weight_control.gate.require_alike(what)
            failure: Exception | None = None
            try:
                check()
            except (ValueError, WeightSyncError) as error:
                failure = error
            self.weight_control.session.agree(failure)
            self._end_lost_update(counts_left)

        self.weight_control.gate.between_steps(settle)

    def _end_lost_update(self, counts_left: bool = True) -> None:
        """Break off the session that no rank's trainer can end, or of which any has refused some.

        counts_left: whether one is that has come by groups which the engine has left since. Every
        rank calls it: they agree.
        """
        if (opened := self._opened) is None:
            return
        reason = opened.refusal or opened.loss(self._update_groups.values(), counts_left)
        group = self.weight_control.session.group
        told = [reason] if group is None else gather_objects(reason, group)
        if reason := next(filter(None, told), ""):
            self._opened = None
            opened.abort(reason)

    def _leave_update_groups(self) -> None:
        while self._update_groups:
            group = self._update_groups.popitem()[1]
            group.leave(is_broken=group.is_lost)

    def _update_group(self, group_name: str) -> UpdateGroup:
        if group_name not in self._update_groups:
            known = ", ".join(self._update_groups) or "none"
            raise ValueError(
                f"no weight group '{group_name}' (there are: {known}); call "
                "init_weights_update_group first"
            )
        return self._update_groups[group_name]
