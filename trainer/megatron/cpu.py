"""What Megatron-core needs to run on a machine without CUDA. Nothing else in the project knows.

Megatron calls torch.cuda for the current device and stream: `install` replaces a few functions. Its
optimizers and schedules write device="cuda" literally: `no_cuda` redirects that while they run.
"""

import contextlib
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def install() -> None:
    """Make torch.cuda's queries answer for the CPU, once per process, where there is no GPU."""
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import random

    device, cuda = torch.device("cpu"), cast(Any, torch.cuda)
    # Sequence parallel embeddings fork a CUDA generator for their dropout, which is 0 here, and
    # recomputed layers save and restore its state.
    random.CudaRNGStatesTracker.fork = lambda *args, **kwargs: contextlib.nullcontext()
    random._get_cuda_rng_state = random._set_cuda_rng_state = lambda *args, **kwargs: None
    cuda.current_device = lambda: device
    cuda.synchronize = cuda.current_stream = lambda *args, **kwargs: None


class _CpuForCuda(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        result = func(*args, **kwargs)
        if func is Tensor.type and len(args) == 1:
            return result.replace("torch.", "torch.cuda.")
        return result


def no_cuda() -> contextlib.AbstractContextManager[Any]:
    """Within it, device="cuda" means the CPU where there is no GPU."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CpuForCuda()
