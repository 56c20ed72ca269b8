"""EngineConfig: the engine's settings, checked before anything is allocated."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from samebit.kernels.reduce import ALONE, RankGroup, peers_of
from samebit.rollout.values import MAX_UINT64, as_flag, as_integer, shown

_INTEGERS = ("page_size", "max_batch_tokens", "max_num_seqs", "prefill_chunk", "seed")
_OPTIONAL_INTEGERS = ("kv_cache_tokens", "max_model_len")
_FLAGS = ("prefix_cache", "cuda_graphs", "overlap")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Apart from model, device, dtype, seed and ranks, none can change a token or a log-prob."""

    model_path: Path
    device: torch.device
    dtype: torch.dtype
    page_size: int = 64
    """Tokens per KV page."""
    kv_cache_tokens: int | None = None
    """KV capacity in tokens; None takes what max_num_seqs sequences can need, within 1 GiB on the
    CPU and half of the free memory on a GPU."""
    max_batch_tokens: int = 4096
    """Tokens computed in one step, over all sequences."""
    max_num_seqs: int = 256
    """Sequences running at a time."""
    prefill_chunk: int = 1024
    """Prompt tokens of one sequence computed in one step."""
    max_model_len: int | None = None
    """Longest context, prompt and completion; None takes the model's."""
    prefix_cache: bool = True
    load_format: str = "safetensors"
    seed: int = 0
    cuda_graphs: bool = False
    """Decode by CUDA graphs; over tensor parallel ranks those of GPUs that read each other."""
    ranks: RankGroup = ALONE
    """Tensor parallel ranks; each runs an engine of its own and is given the same requests."""
    overlap: bool = False
    """Plan and start a step while the one before still runs."""

    def __post_init__(self) -> None:
        self._bring_to_type()
        for name in ("page_size", "max_batch_tokens", "max_num_seqs", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"Engine {name} is {getattr(self, name)}; it must be at least 1")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"Engine max_model_len is {self.max_model_len}; it must be at least 1")
        if not 0 <= self.seed <= MAX_UINT64:
            raise ValueError(f"Engine seed is {self.seed}; it must be an unsigned 64-bit integer")
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < self.page_size:
            raise ValueError(
                f"Engine kv_cache_tokens is {self.kv_cache_tokens}; it must hold at least one page "
                f"of {self.page_size} tokens"
            )
        if self.cuda_graphs and self.device.type != "cuda":
            raise ValueError(f"Engine cuda_graphs=True needs a CUDA device, not '{self.device}'")
        if self.cuda_graphs and not can_record(self.device, self.ranks):
            raise ValueError(
                f"Engine cuda_graphs=True with {self.ranks.size} tensor parallel ranks needs GPUs "
                "that can read each other's memory; leave it unset"
            )
        if self.load_format not in ("safetensors", "dummy"):
            raise ValueError(
                f"Engine load_format is '{self.load_format}'; use 'safetensors' or 'dummy'"
            )

    def _bring_to_type(self) -> None:
        given = [name for name in _OPTIONAL_INTEGERS if getattr(self, name) is not None]
        for name in (*_INTEGERS, *given):
            self._set(name, as_integer(getattr(self, name), f"Engine {name}"))
        for name in _FLAGS:
            self._set(name, as_flag(getattr(self, name), f"Engine {name}"))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def as_path(value: object, what: str) -> Path:
    """A path, given as text or Path; ValueError, which says `what`, for anything else."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(f"{what} is {shown(value)}; it must be the path of a local model folder")
    return Path(value)


def as_ranks(value: object) -> RankGroup:
    """Tensor parallel ranks; ValueError for anything else."""
    if not isinstance(value, RankGroup):
        raise ValueError(f"Engine ranks is {shown(value)}; it must be RankGroup, with a group")
    return value


def can_record(device: torch.device, ranks: RankGroup) -> bool:
    """Whether CUDA graphs can hold a step: tensor parallel ranks have to read each other's GPU."""
    return device.type == "cuda" and (ranks.size == 1 or peers_of(ranks, device) is not None)


def automatic_kv_bytes(device: torch.device) -> int:
    """Bound of the automatic KV capacity, once the weights are in place."""
    if device.type == "cpu":
        return 1 << 30
    return torch.cuda.mem_get_info(device)[0] // 2


class DeviceError(RuntimeError):
    """The device asked for is not there."""


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
