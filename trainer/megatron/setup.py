"""Process groups and Megatron's parallel state, once per process."""

import atexit
import logging
import os

import torch
import torch.distributed as dist

from samebit.kernels.reduce import TensorRanks
from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron import cpu
from samebit.trainer.megatron.parallel import ranks_of


def initialize(device: torch.device, parallel: ParallelConfig) -> TensorRanks:
    """Start torch.distributed and Megatron's groups, once; this process among the tensor ranks.

    Under a launcher (RANK and WORLD_SIZE set) the environment gives the group; else a group of one.
    Raises ValueError if the processes do not fit `parallel`.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        for name in ("megatron.core", "megatron"):
            logging.getLogger(name).setLevel(logging.ERROR)
        cpu.install()
        _start_group(device)
        size = dist.get_world_size()
        if size != parallel.num_processes:
            raise ValueError(
                f"trainer.parallel asks for tensor x data = {parallel.tensor} x {parallel.data} = "
                f"{parallel.num_processes} processes; there are {size}"
            )
        parallel_state.initialize_model_parallel(parallel.tensor, 1)
        if device.type == "cuda":
            model_parallel_cuda_manual_seed(0)
    ranks = ranks_of(parallel_state.get_tensor_model_parallel_group())
    running = (ranks.size, parallel_state.get_data_parallel_world_size())
    if running != (parallel.tensor, parallel.data):
        raise ValueError(
            f"trainer.parallel asks for tensor x data = {parallel.tensor} x {parallel.data}; this "
            f"process runs with {running[0]} x {running[1]}"
        )
    return ranks


def _start_group(device: torch.device) -> None:
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)
