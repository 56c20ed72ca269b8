"""The data planes by name."""

import torch

from samebit.weight_sync.transports.ipc import IpcPeers
from samebit.weight_sync.transports.nccl import NcclPeers
from samebit.weight_sync.transports.peers import DataPlane, GlooPeers

DATA_PLANES = ("gloo", "ipc", "nccl")


def make_data_plane(name: str, device: torch.device) -> DataPlane:
    """One for weights on this device. Raises ValueError for another name or device."""
    if name not in DATA_PLANES:
        raise ValueError(f"backend '{name}' is unknown; use one of {list(DATA_PLANES)}")
    if name == "gloo":
        return GlooPeers()
    if device.type != "cuda":
        raise ValueError(f"backend '{name}' needs weights on a GPU, not on '{device}'; use gloo")
    return IpcPeers(device) if name == "ipc" else NcclPeers(device)
