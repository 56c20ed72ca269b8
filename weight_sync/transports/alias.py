"""alias: engine and trainer in one process, holding the same memory. Nothing moves."""

from pathlib import Path
from typing import Any, Self

from samebit.weight_sync.transports.base import Lease, WeightSource


class AliasLease(Lease):
    """The sink's parameters are the trainer's, which Engine.bind_weights has seen to."""

    @classmethod
    def between(cls, source: WeightSource, engine: Any, folder: Path) -> Self:
        """Bind an engine of this process to the trainer's parameters."""
        engine.bind_weights(source.params, source.step)
        return cls(engine.sink)
