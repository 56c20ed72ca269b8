"""What a card has, for kernels that are launched otherwise on another one."""

import functools
from typing import Any

import torch


@functools.lru_cache(maxsize=8)
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of the card."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=8)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's types lack it
    return properties.shared_memory_per_block_optin


@functools.lru_cache(maxsize=8)
def generation(device: torch.device) -> int:
    """The first number of its compute capability: 9 is Hopper; 0: not a GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
