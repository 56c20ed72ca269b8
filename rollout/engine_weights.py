"""EngineWeights: the engine's public methods that concern its weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from samebit.rollout.runtime.engine_loop import EngineLoop
from samebit.rollout.runtime.weight_control import WeightControl
from samebit.weight_sync.session import Content
from samebit.weight_sync.transports.base import WeightSink
from samebit.weight_sync.transports.data_planes import make_data_plane
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.shards import Held, ShardReceiver
from samebit.weight_sync.types import WeightSyncError, WeightVersion

PAUSE_MODES = ("abort", "retract", "keep")


class EngineWeights:
    """What Engine serves and how that changes; its other half makes what stands here."""

    loop: EngineLoop
    weight_control: WeightControl
    device: torch.device
    _receiver: ShardReceiver | None = None

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

    def get_weights_by_name(self, name: str) -> Tensor:
        """A copy of one parameter by its engine (Megatron) name; KeyError if there is none."""
        self.weight_control.require_resident()
        return self.weights[name].clone()

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        self.loop.between_steps(self.loop.book.flush_cache)

    def bind_weights(self, params: Mapping[str, Tensor], step: int = 0) -> WeightVersion:
        """Serve the trainer's own parameters from its memory (transport "alias")."""
        return self.weight_control.bind_weights(params, step)

    def copy_weights(
        self, params: Mapping[str, Tensor], step: int, digest: str | None = None
    ) -> WeightVersion:
        """Copy a full set of parameters (engine names) into place."""
        return self.weight_control.copy_weights(params, step, digest)

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """Load a Hugging Face folder in place, under its own version if it carries one.

        A folder that is missing or does not fit is refused before anything changes, as is one whose
        config.json, if it has one, is of another model.
        """
        return self.weight_control.update_weights_from_disk(model_path, step)

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
        data = make_data_plane(backend, self.device)
        group = WeightGroup(master_address, master_port, rank, world_size, timeout_s, secret)
        session = self.weight_control.session
        session.meet_sender()
        self._receiver = ShardReceiver(group, data, Held(session.specs, session.params))

    def receive_weight_update(self) -> WeightVersion:
        """Take one update from the weight group, in place."""
        if self._receiver is None:
            raise WeightSyncError("no weight group; call join_weight_transport first")
        self._receiver.receive(self.sink)
        return self.weight_version
