"""rms_norm on the CPU: exact operations around one sum and one reciprocal root."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D] fp32 -> (normalised [..., D], inverse rms [..., 1])."""
    x = x.contiguous()
    inverse_rms = torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)
    return x * inverse_rms * weight, inverse_rms
