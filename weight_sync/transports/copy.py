"""copy: whole parameters into an engine's own memory, in one process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from samebit.weight_sync.buckets import cut_buckets, pack
from samebit.weight_sync.transports.base import SinkTransport, WeightSource


class CopyTransport(SinkTransport):
    """For what is too small to be shared: a draft. The sender's layout is the receiver's."""

    @classmethod
    def between(cls, source: WeightSource, engine: Any, folder: Path) -> Self:
        """To an engine of this process."""
        return cls(engine.sink)

    def send(self, params: Mapping[str, Tensor]) -> None:
        """Copy tensor after tensor."""
        for metas in cut_buckets(params, 1):
            self._sink.receive(pack(metas, params))
