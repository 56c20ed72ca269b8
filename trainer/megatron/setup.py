"""Process groups and Megatron's parallel state, once per process."""

import atexit
import logging
import os

import torch
import torch.distributed as dist

from samebit.trainer.megatron import cpu


def initialize(device: torch.device) -> None:
    """Start torch.distributed and Megatron's groups; does nothing the second time.

    Under a launcher (RANK and WORLD_SIZE set) the environment gives the group; else a group of one.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        return
    for name in ("megatron.core", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cpu.install()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    if dist.get_world_size() != 1:
        raise NotImplementedError(
            f"world size is {dist.get_world_size()}; the trainer runs in one process so far"
        )
    parallel_state.initialize_model_parallel(1, 1)
    if device.type == "cuda":
        model_parallel_cuda_manual_seed(0)
