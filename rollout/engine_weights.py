"""EngineWeights: the engine's public methods that concern its weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from samebit.kernels.reduce import RankGroup
from samebit.rollout.device import on_device
from samebit.rollout.runtime.engine_loop import EngineLoop
from samebit.rollout.runtime.hf_weights import HFWeights
from samebit.rollout.runtime.weight_control import WeightControl
from samebit.rollout.values import as_integer, as_list, as_number, shown
from samebit.rollout.weight_arguments import (
    as_names,
    as_pairs,
    as_shapes,
    as_step,
    as_tensors,
    require_plain,
)
from samebit.weight_sync.session import Content, SessionState
from samebit.weight_sync.transports.base import WeightSink
from samebit.weight_sync.transports.data_planes import make_data_plane
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.shards import Held, ShardReceiver
from samebit.weight_sync.types import WeightSyncError, WeightVersion
from samebit.weight_sync.update_group import Broadcasts, join_update_group, leave_update_group

PAUSE_MODES = ("abort", "retract", "keep")


class EngineWeights:
    """What Engine serves and how that changes; its other half makes what stands here."""

    loop: EngineLoop
    weight_control: WeightControl
    device: torch.device
    ranks: RankGroup
    _receiver: ShardReceiver | None = None

    @cached_property
    def _update_groups(self) -> dict[str, tuple[ProcessGroup, float]]:
        """By name, with the seconds that a member may stay away."""
        return {}

    # -- pauses ----------------------------------------------------------------------------------

    def pause_generation(self, mode: str = "abort") -> None:
        """Take no steps until `continue_generation`; weights may change meanwhile.

        New calls are queued and wait. What is unfinished, by mode: "abort" ends it, as it is;
        "retract" has the contexts computed anew, by the weights that are served then; "keep" (also
        "in_place") keeps keys and values, so that a sample which has drawn tokens goes on as one of
        several versions. Spans of the completions tell which. Raises ValueError for another mode,
        and RuntimeError where the tensor parallel ranks would pause at different steps.
        """
        mode = "keep" if mode == "in_place" else mode
        if mode not in PAUSE_MODES:
            hint = "; wait for the calls, then pause" if mode == "wait" else ""
            known = ", ".join(PAUSE_MODES)
            raise ValueError(f"pause mode '{mode}' is unknown; use one of {known}{hint}")
        self.loop.pause(mode)

    def continue_generation(self) -> None:
        """Go on after `pause_generation`. Without a pause it does nothing.

        Raises WeightSyncError while the weights are not one whole version: it stays paused.
        """
        self.loop.between_steps(self.loop.book.go_on)

    @property
    def is_paused(self) -> bool:
        """Whether generation is paused."""
        return self.loop.book.is_paused

    # -- what is served --------------------------------------------------------------------------

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The parameters that are served, by their engine (Megatron) names."""
        return self.weight_control.session.params

    @property
    def sink(self) -> WeightSink:
        """What a transport of this process updates."""
        return self.weight_control

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the weights that are served."""
        return self.weight_control.version

    def weight_report(self) -> dict[str, Content]:
        """What every tensor holds, by its engine name: "old", "new" or "unknown".

        After an update that broke off: old is untouched since the last version, new is the whole
        of what the update brought, unknown is anything else. All are old while one is served.
        """
        return self.weight_control.session.report()

    def digest(self) -> str:
        """weights_digest of the weights as they are now, over all tensor parallel ranks."""
        return self.weight_control.digest()

    def get_weights_by_name(self, name: str, truncate_size: int | None = None) -> Tensor:
        """A copy of a whole tensor by its Hugging Face name, or of this rank's by its engine name.

        truncate_size: so many rows, the first. Tensor parallel ranks ask for a Hugging Face tensor
        alike, and get it on the CPU. Raises KeyError that names the nearest if there is none.
        """
        self.weight_control.require_resident()
        [name] = as_names([name])
        if truncate_size is not None and (size := as_integer(truncate_size, "truncate_size")) < 0:
            raise ValueError(f"truncate_size is {size}; it must be at least 0, or unset")
        return HFWeights(self.weight_control.session).whole(name)[:truncate_size]

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        self.loop.between_steps(self.loop.book.flush_cache)

    def bind_weights(self, params: Mapping[str, Tensor], step: int = 0) -> WeightVersion:
        """Serve the trainer's own parameters from its memory (transport "alias")."""
        return self.weight_control.bind_weights(as_tensors(params), as_step(step))

    def copy_weights(
        self, params: Mapping[str, Tensor], step: int, digest: str | None = None
    ) -> WeightVersion:
        """Copy a full set of parameters (engine names) into place."""
        return self.weight_control.copy_weights(as_tensors(params), as_step(step), digest)

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """Load a Hugging Face folder in place, under its own version if it carries one.

        A folder that is missing or does not fit is refused before anything changes, as is one whose
        config.json, if it has one, is of another model. An engine that serves its trainer's own
        parameters (Engine(weights=...), bind_weights) writes to those.
        """
        step = None if step is None else as_step(step)
        return self.weight_control.update_weights_from_disk(model_path, step)

    # -- updates as RL frameworks make them ------------------------------------------------------

    def begin_weight_update(self, selector: str = "all", step: int | None = None) -> None:
        """Open a session for a full update to `step`, by default the next one.

        The engine has to be idle or paused. selector: the served models that the update is of:
        "all" or "target", which are the same. Raises ValueError for an unknown one, and
        WeightSyncError for "draft", which is not served, another session, or a stale step.
        """
        step = self.weight_version.step + 1 if step is None else as_step(step)
        self.weight_control.begin(step, selector)

    def end_weight_update(self, digest: str | None = None) -> WeightVersion:
        """Serve what came in the session; the version has the digest of the weights themselves.

        digest: the sender's, to be compared. Raises WeightSyncError, and serves nothing, if
        tensors are missing or not finite, or if anything was refused in the session.
        """
        return self.weight_control.commit(digest)

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
        self.weight_control.session.meet_sender()

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
        weights = HFWeights(self.weight_control.session)
        weights.require_session()
        group, timeout_s = self._update_group(group_name)
        with self._breaking(group_name), on_device(self.device):
            weights.require_fit(names, dtypes, shapes)
            broadcasts = Broadcasts(group, timeout_s)
            for name in names:
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
        weights, named = HFWeights(self.weight_control.session), as_pairs(named_tensors)
        weights.require_session()
        with self._breaking():
            tensors = [tensor for _, tensor in named]
            names, dtypes = [name for name, _ in named], [str(t.dtype) for t in tensors]
            weights.require_fit(names, dtypes, [tuple(tensor.shape) for tensor in tensors])
            for name, tensor in named:
                weights.take(name, tensor.detach())

    @contextmanager
    def _breaking(self, group_name: str | None = None) -> Iterator[None]:
        """Whatever ends the block early breaks the session's update, and the group."""
        session = self.weight_control.session
        try:
            yield
        except BaseException as error:
            if group_name is not None:
                leave_update_group(self._update_groups.pop(group_name)[0], is_broken=True)
            if session.state is SessionState.UPDATING:
                with suppress(WeightSyncError):  # the first error is the one to tell
                    session.refuse(str(error) or repr(error))
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

    # -- updates by samebit's own transports -----------------------------------------------------

    def join_weight_transport(
        self,
        master_address: str,
        master_port: int,
        rank: int,
        world_size: int,
        backend: str = "gloo",
        timeout_s: float = 600.0,
        secret: str | None = None,
    ) -> None:
        """Join the trainers' weight group as `rank`, behind all of theirs.

        backend: how bytes come, gloo, nccl or ipc. timeout_s: how long the others are waited for.
        secret: what the trainer and all engines have to know, by default SAMEBIT_SECRET of the
        environment; on one machine there need be none. Raises ValueError if theirs is another.
        """
        rank, world_size = as_integer(rank, "rank"), as_integer(world_size, "world_size")
        master_port = as_integer(master_port, "master_port")
        timeout_s = as_number(timeout_s, "timeout_s")
        self.leave_weight_transport()
        data = make_data_plane(backend, self.device)
        group = WeightGroup(master_address, master_port, rank, world_size, timeout_s, secret)
        session = self.weight_control.session
        session.meet_sender()
        self._receiver = ShardReceiver(group, data, Held(session.specs, session.params))

    def leave_weight_transport(self) -> None:
        """Let go of the trainers' weight group, if there is one."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def receive_weight_update(self) -> WeightVersion:
        """Take one update from the weight group, in place."""
        if self._receiver is None:
            raise WeightSyncError("no weight group; call join_weight_transport first")
        self._receiver.receive(self.sink)
        return self.weight_version
