"""alias: engine and trainer in one process, holding the same memory. Nothing moves."""

from pathlib import Path
from typing import Any, Self

from samebit.weight_sync.transports.base import Lease, WeightSource


class AliasLease(Lease):
    """The sink's parameters are the trainer's, which Engine.bind_weights has seen to."""

    @classmethod
    def between(cls, source: WeightSource, engine: Any, folder: Path) -> Self:
        """Bind an engine of this process to the trainer's parameters."""
        shared, own = source.params, engine.weights
        same = {n: p.data_ptr() for n, p in shared.items()} == {
            n: p.data_ptr() for n, p in own.items()
        }
        if not same or engine.weight_version.step != source.step:  # else it was made on them
            engine.bind_weights(shared, source.step)
        return cls(engine.sink)
