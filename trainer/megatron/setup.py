"""The processes that train together, and their groups for each layout."""

import atexit
import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron import cpu
from samebit.weight_sync.meeting import (
    check_secret,
    is_on_one_machine,
    own_secret,
    prove_secret,
    stay_on_loopback,
)
from samebit.weight_sync.objects import gather_objects

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

TIMEOUT = timedelta(hours=4)
"""Of a collective: one process may score, evaluate or write for long. A launcher sees who dies."""

# What makes cuBLAS and NCCL take the same way every time, read once when they start.
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NCCL_NVLS_ENABLE": "0",
}

# Made once for each layout of this process: a critic may have another than its policy.
_groups: "dict[tuple[int, ...], ProcessGroupCollection]" = {}


def process_groups(device: torch.device, parallel: ParallelConfig) -> "ProcessGroupCollection":
    """Return Megatron's groups of this process under a layout; the first call starts
    torch.distributed. All processes ask for the same layouts in the same order.

    Megatron's global state is empty but while it makes them: a part of it that is not told its
    groups fails, and never takes another layout's. Raises ValueError if the processes do not fit
    `parallel`.
    """
    if not _groups:
        for name in ("megatron.core", "megatron"):
            logging.getLogger(name).setLevel(logging.ERROR)
        cpu.install()
        dist.all_gather_object = _all_gather_plain  # what Megatron tells about parameter groups
    start_processes(device, parallel)
    if parallel.layout not in _groups:
        _groups[parallel.layout] = _make_groups(device, parallel)
    return _groups[parallel.layout]


def _make_groups(device: torch.device, parallel: ParallelConfig) -> "ProcessGroupCollection":
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    before = dict(vars(parallel_state))
    parallel_state.initialize_model_parallel(
        *(parallel.tensor, parallel.pipeline),
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=TIMEOUT.total_seconds() / 60,
        create_gloo_process_groups=False,  # of its own checkpoints
    )
    if device.type == "cuda" and not _groups:
        model_parallel_cuda_manual_seed(0)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # Its destroy_model_parallel forgets not all: a group, and the ranks of several, stay readable.
    vars(parallel_state).update(before)
    return groups


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
            f"{parallel.key} asks for {parallel} = {parallel.num_processes} processes; there are "
            f"{size}"
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
