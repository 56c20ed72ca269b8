"""DraftSide: an engine as transports know one, of whose models they update the draft."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from samebit.rollout.engine import Engine
from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.remote import RemoteEngine
from samebit.weight_sync.meeting import LOOPBACK
from samebit.weight_sync.transports.base import WeightSink
from samebit.weight_sync.types import WeightSyncError, WeightVersion

_DRAFT = "draft"


@dataclass(frozen=True)
class DraftSides:
    """Those of a pool's replicas."""

    _pool: EnginePool

    @property
    def replicas(self) -> tuple["DraftSide", ...]:
        """One for each that draws: a successor has a draft from its start, and comes in with its
        target's first update."""
        return tuple(map(DraftSide, self._pool.living))


@dataclass(frozen=True)
class DraftSide:
    """An engine of this process or another's, with a draft: its methods, of the draft alone."""

    _engine: Engine | RemoteEngine

    @property
    def address(self) -> str:
        """This machine, as the engine's processes reach it."""
        return getattr(self._engine, "address", LOOPBACK)

    @property
    def num_ranks(self) -> int:
        """Tensor parallel ranks, each of which has the whole draft."""
        return getattr(self._engine, "num_ranks", 1)

    @property
    def sink(self) -> WeightSink:
        """What a transport of this process updates."""
        return self._here.served(_DRAFT)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The parameters, by their engine names."""
        return self._here.served(_DRAFT).session.params

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the draft's last whole version."""
        version = self._engine.draft_version
        if version is None:
            raise WeightSyncError("no draft model is served")
        return version

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """See Engine.update_weights_from_disk."""
        return self._engine.update_weights_from_disk(model_path, step, _DRAFT)

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
        """See Engine.join_weight_transport."""
        place = master_address, master_port, rank, world_size
        self._engine.join_weight_transport(*place, backend, timeout_s, secret, _DRAFT)

    def leave_weight_transport(self) -> None:
        """See Engine.leave_weight_transport."""
        self._engine.leave_weight_transport(_DRAFT)

    def receive_weight_update(self) -> WeightVersion:
        """See Engine.receive_weight_update."""
        return self._engine.receive_weight_update(_DRAFT)

    def kill(self) -> None:
        """See RemoteEngine.kill."""
        assert isinstance(self._engine, RemoteEngine), "this process's engine is not killed"
        self._engine.kill()

    @property
    def _here(self) -> Engine:
        assert isinstance(self._engine, Engine), "the engine of another process has no sink here"
        return self._engine
