"""stages: every stage of a pipeline broadcasts its parameters to the engines of all stages.

Each process of the pipeline has an engine of the whole model (its tensor parallel shard), which
takes the buckets in place. An engine that refuses them ends its process, and so the run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

from samebit.weight_sync.buckets import cut_buckets, pack
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.transports.base import SinkTransport, WeightSink, WeightSource


class StageTransport(SinkTransport):
    """`whole`: the engine's parameters by name; `group`: the processes of this pipeline."""

    def __init__(
        self,
        sink: WeightSink,
        whole: Mapping[str, Tensor],
        group: dist.ProcessGroup,
        bucket_bytes: int = 256 << 20,
    ) -> None:
        super().__init__(sink)
        self._whole = whole
        self._group = group
        self._bucket_bytes = bucket_bytes

    @classmethod
    def between(cls, source: WeightSource, engine: Any, folder: Path) -> Self:
        """Serve an engine of this process and those of the other stages."""
        return cls(engine.sink, engine.weights, source.pipeline_group)

    def send(self, params: Mapping[str, Tensor]) -> None:
        """Broadcast what this stage holds and take what the others do."""
        for owner, held in enumerate(gather_objects(list(params), self._group)):
            source = dist.get_global_rank(self._group, owner)
            mine = source == dist.get_rank()
            tensors = {name: self._whole[name] for name in self._whole if name in held}
            for metas in cut_buckets(tensors, self._bucket_bytes):
                bucket = pack(metas, params) if mine else self._sink.bucket_for(metas)
                dist.broadcast(bucket.buffer, source, group=self._group)
                self._sink.receive(bucket)
