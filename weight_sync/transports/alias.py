"""alias: engine and trainer in one process, holding the same memory. Nothing moves.

The trainer owns the parameters and its optimizer writes them between `begin` and `send`, so that no
rollout can see half a step.
"""

from collections.abc import Mapping

import torch

from samebit.weight_sync.transports.base import WeightSink
from samebit.weight_sync.types import WeightVersion


class AliasTransport:
    """`sink` must have bound the trainer's parameters before (Engine.bind_weights)."""

    def __init__(self, sink: WeightSink) -> None:
        self._sink = sink

    def begin(self, step: int) -> None:
        """The engine stops serving; the optimizer may write."""
        self._sink.begin_weight_update(step)

    def send(self, params: Mapping[str, torch.Tensor]) -> None:
        """Nothing to move; the sink checks that it holds this very memory."""
        self._sink.receive_weights_in_place(params)

    def commit(self, digest: str) -> WeightVersion:
        """The engine serves the new version."""
        return self._sink.commit_weight_update(digest)

    def abort(self, reason: str) -> None:
        """The shared memory may hold half a step."""
        self._sink.abort_weight_update(reason)

    def close(self) -> None:
        """Nothing is held."""
