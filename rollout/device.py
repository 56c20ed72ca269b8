"""Where an engine lives: the device, its dtype, and what the settings leave to it."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from samebit.kernels.reduce import RankGroup, peers_of
from samebit.rollout.config import EngineConfig
from samebit.rollout.values import shown

logger = logging.getLogger(__name__)


class DeviceError(RuntimeError):
    """The device asked for is not there."""


def settled(config: EngineConfig, device: torch.device, ranks: RankGroup) -> EngineConfig:
    """The settings with what is unset of CUDA graphs, overlap and releasable memory decided by the
    device.

    Raises ValueError for CUDA graphs or releasable memory where there can be none.
    """
    graphs = config.cuda_graphs
    if graphs is None:
        graphs = can_record(device, ranks)
    elif graphs and device.type != "cuda":
        raise ValueError(f"engine.cuda_graphs=True needs a CUDA device, not '{device}'")
    elif graphs and not can_record(device, ranks):
        raise ValueError(
            f"engine.cuda_graphs=True with {ranks.size} tensor parallel ranks needs GPUs that can "
            "read each other's memory; leave it unset"
        )
    overlap = config.overlap
    if overlap is None:
        overlap = device.type == "cuda"
    releasable = config.releasable
    if releasable is not False and (why_not := why_not_releasable(device)):
        if releasable:
            raise ValueError(f"engine.releasable=True cannot be: {why_not}")
        logger.warning("the engine's memory cannot be released: %s", why_not)
        releasable = False
    releasable = releasable is not False
    return replace(config, cuda_graphs=graphs, overlap=overlap, releasable=releasable)


def why_not_releasable(device: torch.device) -> str:
    """What keeps memory of the device from being released; "" if nothing does."""
    if device.type == "cpu":
        return ""
    from samebit.kernels.gpu.vmm import VmmError, vmm

    try:
        vmm().require_able(device.index or 0)
    except VmmError as error:
        return str(error)
    return ""


def as_ranks(value: object) -> RankGroup:
    """Tensor parallel ranks; ValueError for anything else."""
    if not isinstance(value, RankGroup):
        raise ValueError(f"Engine ranks is {shown(value)}; it must be RankGroup, with a group")
    return value


def can_record(device: torch.device, ranks: RankGroup) -> bool:
    """Whether CUDA graphs can hold a step: tensor parallel ranks have to read each other's GPU."""
    return device.type == "cuda" and (ranks.size == 1 or peers_of(ranks, device) is not None)


def automatic_kv_bytes(device: torch.device, fraction: float | None) -> int:
    """Bound of the automatic KV capacity, once the weights are in place."""
    if device.type == "cpu":
        return 1 << 30
    torch.cuda.empty_cache()  # what torch only keeps is free as well
    return int(torch.cuda.mem_get_info(device)[0] * (fraction or 0.5))


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU if there is one; DeviceError for a missing GPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        known = resolved.type in ("cpu", "cuda")
    except (RuntimeError, TypeError):
        known = False
    if not known:
        raise DeviceError(f"device is '{device}'; it must be cpu or cuda")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "device=cuda was asked for, but torch finds no CUDA device; use device=cpu"
        )
    return resolved


def own_device(device: str | torch.device | None) -> torch.device:
    """resolve_device for something that lives in this process: a GPU with its index.

    Raises ValueError for another than the current CUDA device, on which kernels are launched.
    """
    resolved = resolve_device(device)
    if resolved.type != "cuda":
        return resolved
    current = torch.device("cuda", torch.cuda.current_device())
    if resolved.index is not None and resolved != current:
        raise ValueError(
            f"Engine device is '{resolved}'; it must be the current CUDA device, '{current}': "
            "torch.cuda.set_device comes first"
        )
    return current


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """The block launches kernels on this device, whatever the thread's current one is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """fp32 on the CPU and bf16 on the GPU: the dtypes of the numerics contract."""
    contract = torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype is None:
        return contract
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved != contract:
        raise ValueError(
            f"dtype is {dtype}; the numerics contract on '{device.type}' is defined in {contract}"
        )
    return contract
