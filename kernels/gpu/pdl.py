"""Programmatic dependent launch: the next kernel's start-up hides behind the present one's work.

Every decode kernel calls `after_previous` before it reads what its predecessor wrote, and lets its
own successor start from there on. What comes before the call may read weights and what older
kernels wrote: the Hopper kernels read whole tiles of keys there, of earlier steps, which no kernel
writes that comes directly before them (AttentionKind.reads_ahead). Source: CUDA C++ Programming
Guide, "Programmatic Dependent Launch".
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.lru_cache(maxsize=8)
def supported(device: torch.device) -> bool:
    """Whether the device has it (Hopper and later)."""
    return torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait for the preceding kernel's results; let the following kernel start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch_l2(pointers):
    """Ask for the 128-byte lines at these addresses to come to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
