"""alias: engine and trainer in one process, holding the same memory. Nothing moves.

The trainer owns the parameters and its optimizer writes them between `begin` and `send`, so that no
rollout can see half a step.
"""

from collections.abc import Mapping

import torch

from samebit.weight_sync.transports.base import SinkTransport


class AliasTransport(SinkTransport):
    """The sink must have bound the trainer's parameters before (Engine.bind_weights).

    From `begin` on the optimizer may write; an aborted update may have left half a step.
    """

    def send(self, params: Mapping[str, torch.Tensor]) -> None:
        """Nothing to move; the sink checks that it holds this very memory."""
        self._sink.receive_weights_in_place(params)
