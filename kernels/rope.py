"""rope: rotary position embedding from one fp32 table, applied after the q/k norm.

Contract: the first and second halves of each head are rotated by position * frequency: products
and sums in fp32, one rounding. What a kind of scaling changes is in the table. Source: Su et al.
2021, arXiv 2104.09864, in the half-split layout of Hugging Face checkpoints.
"""

import math
from typing import Any

import torch
from torch import Tensor

from samebit.kernels.op import Op, applied

SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""The kinds of `scaling` that there are, and what each of them takes."""
OPTIONAL_KEYS = SCALING_KEYS["yarn"][2:]
"""Those that may be left out; all but truncate, which is true or false, are numbers."""


def rope_table(
    head_dim: int,
    theta: float,
    max_position: int,
    scaling: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """cos and sin of every angle, [max_position, Dh] in fp32: Dh/2 cosines, then Dh/2 sines.

    They are computed on the CPU whatever the device, so that every process holds the same table.
    An entry does not depend on max_position. `scaling` is a Hugging Face rope_scaling dict of a
    type in SCALING_KEYS; any other raises ValueError.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency = _frequencies(theta, theta**exponent, scaling)
    angle = torch.arange(max_position, dtype=torch.float32)[:, None] * frequency
    table = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return (table * _attention_factor(scaling or {})).to(device)


def _frequencies(theta: float, period: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    """[Dh/2] fp32, by transformers' operations in their order. period: theta**(2 i / Dh)."""
    kind = (scaling or {}).get("rope_type", "default")
    frequency = 1.0 / period
    if scaling is None or kind == "default":
        return frequency
    if kind == "linear":
        return frequency / scaling["factor"]
    if kind == "yarn":
        return _yarn_frequencies(theta, period, scaling)
    if kind != "llama3":
        *most, last = SCALING_KEYS
        raise ValueError(f"rope_scaling type '{kind}' is unknown; use {', '.join(most)} or {last}")
    # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a ramp between.
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    ramp = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return frequency * ((1 - ramp) / factor + ramp)


def _yarn_frequencies(theta: float, period: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Peng et al. 2023, arXiv 2309.00071: what turns often in the old context is kept, what turns
    rarely is stretched by `factor`, with a ramp over the dimensions between."""
    half, original = len(period), scaling["original_max_position_embeddings"]

    def dimension(num_turns: float) -> float:
        return 2 * half * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling["factor"] * period) * (1 - kept) + 1.0 / period * kept


def _attention_factor(scaling: dict[str, Any]) -> float:
    """What yarn multiplies cosines and sines by; 1 for all others."""
    if scaling.get("rope_type") != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    factor, above, below = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")

    def sharpness(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return sharpness(above) / sharpness(below) if above and below else sharpness(1)


def rope_ref(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """x [T, heads, Dh], positions [T], table [max_position, Dh] -> rotated x, in plain torch."""
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


_forward = Op("rope", cpu=rope_ref, cuda="samebit.kernels.gpu.rope:rope")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(positions, table)
        return _forward(x, positions, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        positions, table = ctx.saved_tensors
        cos, sin = table[positions].chunk(2, dim=-1)
        back = torch.cat([cos, -sin], dim=-1)  # the transposed rotation
        return _forward(grad, torch.arange(len(positions), device=grad.device), back), None, None


def rope(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotate x [T, heads, Dh] to absolute positions [T] by table [max_position, Dh]."""
    return applied(_Rope, x, positions, table)
