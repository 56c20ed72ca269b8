"""The data planes by name."""

import torch

from samebit.weight_sync.transports.ipc import IpcPeers
from samebit.weight_sync.transports.nccl import NcclPeers
from samebit.weight_sync.transports.peers import DataPlane, GlooPeers

DATA_PLANES = ("gloo", "ipc", "nccl")


def make_data_plane(name: str, device: torch.device) -> DataPlane:
    """One for weights on this device. Raises ValueError for another name or device."""
    if name == "gloo":
        return GlooPeers()
    if name == "ipc":
        return IpcPeers(device)
    if name == "nccl":
        return NcclPeers(device)
    raise ValueError(f"backend '{name}' is unknown; use one of {list(DATA_PLANES)}")
