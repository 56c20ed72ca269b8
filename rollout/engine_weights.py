"""EngineWeights: the engine's public methods that concern its weights."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from torch import Tensor

from samebit.rollout.engine_updates import EngineUpdates
from samebit.rollout.runtime.engine_loop import EngineLoop
from samebit.rollout.runtime.hf_weights import HFWeights
from samebit.rollout.values import as_integer, as_number
from samebit.rollout.weight_arguments import as_names, as_step, as_tensors
from samebit.weight_sync.session import Content
from samebit.weight_sync.transports.base import WeightSink
from samebit.weight_sync.transports.data_planes import make_data_plane
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.shards import Held, ShardReceiver
from samebit.weight_sync.types import WeightSyncError, WeightVersion

PAUSE_MODES = ("abort", "retract", "keep")


class EngineWeights(EngineUpdates):
    """What Engine serves and how that changes; its other half makes what stands here.

    selector: "target", the model that draws, or "draft", the one that guesses; WeightSyncError for
    a draft where none is served.
    """

    loop: EngineLoop

    @cached_property
    def _receivers(self) -> dict[str, ShardReceiver]:
        """By selector."""
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

    @property
    def draft_version(self) -> WeightVersion | None:
        """Step and digest of the last whole version of the draft's; None without a draft."""
        return None if self.draft_control is None else self.draft_control.version

    def weight_report(self, selector: str = "target") -> dict[str, Content]:
        """What every tensor holds, by its engine name: "old", "new" or "unknown".

        After an update that broke off: old is untouched since the last version, new is the whole
        of what the update brought, unknown is anything else. All are old while one is served.
        """
        return self.served(selector).session.report()

    def digest(self, selector: str = "target") -> str:
        """weights_digest of the weights as they are now, over all tensor parallel ranks."""
        return self.served(selector).digest()

    def get_weights_by_name(self, name: str, truncate_size: int | None = None) -> Tensor:
        """A copy of a whole tensor by its Hugging Face name, or of this rank's by its engine name.

        Names of a draft's begin with "draft.". truncate_size: so many rows, the first. Tensor
        parallel ranks ask for a Hugging Face tensor alike, and get it on the CPU. Raises KeyError
        that names the nearest if there is none.
        """
        model, name = self._owner(*as_names([name]))
        model.require_resident()
        if truncate_size is not None and (size := as_integer(truncate_size, "truncate_size")) < 0:
            raise ValueError(f"truncate_size is {size}; it must be at least 0, or unset")
        return HFWeights(model.session).whole(name)[:truncate_size]

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        self.loop.between_steps(self.loop.book.flush_cache)

    def bind_weights(self, params: Mapping[str, Tensor], step: int = 0) -> WeightVersion:
        """Serve the trainer's own parameters from its memory (transport "alias")."""
        return self.weight_control.bind_weights(as_tensors(params), as_step(step))

    def copy_weights(
        self,
        params: Mapping[str, Tensor],
        step: int,
        digest: str | None = None,
        selector: str = "target",
    ) -> WeightVersion:
        """Copy a full set of parameters (engine names) into place."""
        return self.served(selector).copy_weights(as_tensors(params), as_step(step), digest)

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None, selector: str = "target"
    ) -> WeightVersion:
        """Load a Hugging Face folder in place, under its own version if it carries one.

        A folder that is missing or does not fit is refused before anything changes, as is one whose
        config.json, if it has one, is of another model. An engine that serves its trainer's own
        parameters (Engine(weights=...), bind_weights) writes to those. A draft's folder has either
        dialect, and differs from the draft that is served in its weights alone.
        """
        step = None if step is None else as_step(step)
        return self.served(selector).update_weights_from_disk(model_path, step)

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
        selector: str = "target",
    ) -> None:
        """Join the trainers' weight group behind all of theirs, and receive what this rank holds. A
        model has one of its own.

        rank: the engine's; its tensor parallel ranks, which all join, have this one and the next.
        backend: how bytes come, gloo, nccl or ipc. timeout_s: how long the others are waited for.
        secret: what the trainer and all engines have to know, by default SAMEBIT_SECRET of the
        environment; on one machine there need be none. Raises ValueError if theirs is another.
        """
        rank, world_size = as_integer(rank, "rank"), as_integer(world_size, "world_size")
        master_port = as_integer(master_port, "master_port")
        timeout_s = as_number(timeout_s, "timeout_s")
        session = self.served(selector).session
        self.leave_weight_transport(selector)
        data = make_data_plane(backend, self.device)
        place = master_address, master_port, rank + self.ranks.rank, world_size
        group = WeightGroup(*place, timeout_s, secret)
        session.meet_sender()
        receiver = ShardReceiver(group, data, Held(session.specs, session.params))
        self._receivers[selector] = receiver

    def leave_weight_transport(self, selector: str = "target") -> None:
        """Let go of the trainers' weight group, if there is one."""
        if (receiver := self._receivers.pop(selector, None)) is not None:
            receiver.close()

    def receive_weight_update(self, selector: str = "target") -> WeightVersion:
        """Take one update from the weight group, in place."""
        model = self.served(selector)
        if (receiver := self._receivers.get(selector)) is None:
            raise WeightSyncError("no weight group; call join_weight_transport first")
        receiver.receive(model)
        return model.version
