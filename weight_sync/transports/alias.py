"""alias: engine and trainer in one process, holding the same memory. Nothing moves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from samebit.weight_sync.transports.base import Lease, WeightSink, WeightSource
from samebit.weight_sync.types import WeightVersion


class AliasLease(Lease):
    """The sink's parameters are the trainer's, which Engine.bind_weights has seen to."""

    def __init__(self, sink: WeightSink) -> None:
        self._sink = sink

    @classmethod
    def between(cls, source: WeightSource, engine: Any, folder: Path) -> Self:
        """Bind an engine of this process to the trainer's parameters."""
        engine.bind_weights(source.params, source.step)
        return cls(engine)

    def take(self, step: int) -> None:
        """Have the engine stop serving, so that no rollout can see half a step."""
        self._sink.begin_weight_update(step)

    def commit(self, params: Mapping[str, torch.Tensor], digest: str) -> WeightVersion:
        """Have the engine check that it holds this very memory, and its digest."""
        self._sink.receive_weights_in_place(params)
        return self._sink.commit_weight_update(digest)

    def abort(self, reason: str) -> None:
        """Have the engine refuse to serve until a commit: there may be half a step."""
        self._sink.abort_weight_update(reason)
