"""Copies from the host to the device that do not make the host wait."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The values on the device once its current stream gets there; what is there stays as it is.

    Through pinned memory: a copy from any other makes the host wait for all work before it.
    """
    tensor = torch.as_tensor(values)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
