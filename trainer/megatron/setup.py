"""Process groups and Megatron's parallel state, once per process."""

import atexit
import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from samebit.kernels.reduce import RankGroup
from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron import cpu
from samebit.trainer.megatron.parallel import ranks_of
from samebit.weight_sync.meeting import (
    check_secret,
    is_on_one_machine,
    own_secret,
    prove_secret,
    stay_on_loopback,
)
from samebit.weight_sync.objects import gather_objects

TIMEOUT = timedelta(hours=4)
"""Of a collective: one process may score, evaluate or write for long. A launcher sees who dies."""

# What makes cuBLAS and NCCL take the same way every time, read once when they start.
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NCCL_NVLS_ENABLE": "0",
}

# What Megatron's groups were made for; a process is initialised once.
_running: list[tuple[int, ...]] = []


def initialize(
    device: torch.device, parallel: ParallelConfig, tp_invariant: bool = False
) -> tuple[RankGroup, RankGroup]:
    """Start torch.distributed and Megatron's groups, once.

    Returns this process among those that share every layer, and among those that share contexts.
    Raises ValueError if the processes do not fit `parallel`.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        for name in ("megatron.core", "megatron"):
            logging.getLogger(name).setLevel(logging.ERROR)
        cpu.install()
        dist.all_gather_object = _all_gather_plain  # what Megatron tells about parameter groups
        start_processes(device, parallel)
        several = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        parallel_state.initialize_model_parallel(
            *(parallel.tensor, parallel.pipeline, several),
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=TIMEOUT.total_seconds() / 60,
        )
        if device.type == "cuda":
            model_parallel_cuda_manual_seed(0)
        _running.append(parallel.groups)
    if _running != [parallel.groups]:
        raise ValueError(
            f"trainer.parallel asks for {parallel}, virtual_pipeline {parallel.virtual_pipeline}; "
            f"this process runs with {_running[0]}"
        )
    tensor = ranks_of(parallel_state.get_tensor_model_parallel_group(), tp_invariant)
    return tensor, ranks_of(parallel_state.get_context_parallel_group())


def start_processes(device: torch.device, parallel: ParallelConfig) -> None:
    """Join the processes that the environment names (RANK, WORLD_SIZE), once, or a group of one.

    Raises ValueError if they are not as many as `parallel` needs, are not told their GPU, or do not
    share a secret where they need one.
    """
    if not dist.is_initialized():
        _start_group(device)
    size = dist.get_world_size()
    if size != parallel.num_processes:
        raise ValueError(
            f"trainer.parallel asks for {parallel} = {parallel.num_processes} processes; there "
            f"are {size}"
        )


def _start_group(device: torch.device) -> None:
    secret = own_secret()
    if is_on_one_machine():
        stay_on_loopback()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join_group(device, secret)
    else:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)


def _join_group(device: torch.device, secret: str) -> None:
    backend = "gloo"
    if device.type == "cuda":
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("RANK is set, LOCAL_RANK is not: it says which GPU is this one's")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"  # small messages need no GPU
    be_deterministic()
    check_secret(secret, "" if is_on_one_machine() else "the processes are on several machines")
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    prove_secret(store, rank, size, secret)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def be_deterministic() -> None:
    """Choose for this process, before it computes anything, what several ones always have: cuBLAS's
    workspace, by whose size it picks the products of gradients."""
    for name, value in DETERMINISTIC.items():
        os.environ.setdefault(name, value)


def _all_gather_plain(
    object_list: list[Any], obj: Any, group: dist.ProcessGroup | None = None
) -> None:
    """torch's all_gather_object without pickles, which run what another process has sent."""
    object_list[:] = gather_objects(obj, group)
