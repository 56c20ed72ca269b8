"""A forward model in the host's memory, such as a reference that is read once a step."""

from typing import Any

from torch import Tensor

from samebit.trainer.megatron.forward import ForwardModel
from samebit.trainer.megatron.optimizer_state import host_zeros_like


class OffloadedModel(ForwardModel):
    """Keeps its weights, `params`, in the host's memory, pinned for a GPU; they are copied to the
    device while log-probs are computed, and their memory there is torch's again at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read: dict[str, Tensor] = dict(self.params)  # by the forward
        self.params = {name: host_zeros_like(param) for name, param in self._read.items()}
        self._leave_device()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            for name, param in self._read.items():
                param.data = self.params[name].to(self.device, non_blocking=True)
            return super()._forward(*args, **kwargs)
        finally:
            self._leave_device()

    def _leave_device(self) -> None:
        for param in self._read.values():
            param.data = param.data.new_empty(0)
