"""rope: rotary position embedding from one fp32 table, applied after the q/k norm.

Contract: the first and second halves of each head are rotated by position * frequency: products
and sums in fp32, one rounding. Source: Su et al. 2021, arXiv 2104.09864, in the half-split
layout of Hugging Face checkpoints.
"""

import math
from typing import Any

import torch

from samebit.kernels.op import Op, require_fp32

SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""The kinds of `scaling` that there are, and the numbers that each of them takes."""


def rope_table(
    head_dim: int,
    theta: float,
    max_position: int,
    scaling: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """cos and sin of every angle, [max_position, Dh] in fp32: Dh/2 cosines, then Dh/2 sines.

    They are computed on the CPU whatever the device, so that every process holds the same table.
    An entry does not depend on max_position. `scaling` is a Hugging Face rope_scaling dict of a
    type in SCALING_KEYS; any other raises ValueError.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency = _scale_frequency(1.0 / (theta**exponent), scaling)
    angle = torch.arange(max_position, dtype=torch.float32)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(device)


def _scale_frequency(frequency: torch.Tensor, scaling: dict[str, Any] | None) -> torch.Tensor:
    kind = (scaling or {}).get("rope_type", "default")
    if scaling is None or kind == "default":
        return frequency
    if kind == "linear":
        return frequency / scaling["factor"]
    if kind != "llama3":
        raise ValueError(f"rope_scaling type '{kind}' is unknown; use default, linear or llama3")
    # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a ramp between.
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    ramp = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return frequency * ((1 - ramp) / factor + ramp)


def rope_ref(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x [T, heads, Dh], positions [T], table [max_position, Dh] -> rotated x, in plain torch."""
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def _rope_cpu(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    require_fp32("rope", x, table)
    return rope_ref(x, positions, table)


_forward = Op("rope", cpu=_rope_cpu, cuda="samebit.kernels.gpu.rope:rope")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(positions, table)
        return _forward(x, positions, table)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        positions, table = ctx.saved_tensors
        cos, sin = table[positions].chunk(2, dim=-1)
        back = torch.cat([cos, -sin], dim=-1)  # the inverse rotation
        return _forward(grad, torch.arange(len(positions), device=grad.device), back), None, None


def rope(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, Dh] to absolute positions [T] by table [max_position, Dh]."""
    return _Rope.apply(x, positions, table)
