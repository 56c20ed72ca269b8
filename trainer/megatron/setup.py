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

# What Megatron's groups were made for; a process is initialised once.
_running: list[tuple[int, ...]] = []


def initialize(device: torch.device, parallel: ParallelConfig) -> tuple[TensorRanks, TensorRanks]:
    """Start torch.distributed and Megatron's groups, once.

    Returns this process among those that share every layer, and among those that share contexts.

    Under a launcher (RANK and WORLD_SIZE set) the environment gives the group; else a group of one.
    Raises ValueError if the processes do not fit `parallel`.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        for name in ("megatron.core", "megatron"):
            logging.getLogger(name).setLevel(logging.ERROR)
        cpu.install()
        start_processes(device)
        size = dist.get_world_size()
        if size != parallel.num_processes:
            raise ValueError(
                f"trainer.parallel asks for {parallel} = {parallel.num_processes} processes; there "
                f"are {size}"
            )
        several = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        parallel_state.initialize_model_parallel(
            *(parallel.tensor, parallel.pipeline, several), context_parallel_size=parallel.context
        )
        if device.type == "cuda":
            model_parallel_cuda_manual_seed(0)
        _running.append(parallel.groups)
    if _running != [parallel.groups]:
        raise ValueError(
            f"trainer.parallel asks for {parallel}; this process runs with {_running[0]}"
        )
    tensor, context = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_context_parallel_group(),
    )
    return ranks_of(tensor, parallel.tp_invariant), ranks_of(context)


def start_processes(device: torch.device) -> None:
    """Join the processes that the environment names, once; without any, a group of one."""
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)
