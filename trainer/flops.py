"""Floating-point operations of training, and the share of the hardware's that they are (MFU).

Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: 6 operations a token and weight, plus
attention, here causal. Activations computed again do not count.
"""

from collections.abc import Iterable

import torch

from samebit.rollout.models.config import ModelConfig

# By the card's whole name: a PCIe card, another form or a slice of one has other figures.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
PEAK_SOURCE = "dense bf16, by the data sheets of H100 SXM and H200"


def train_flops(model: ModelConfig, seq_lens: Iterable[int]) -> int:
    """Of one forward and backward over sequences of these lengths."""
    lens = list(seq_lens)
    attention = sum(model.attention_flops(n) for n in lens)
    return 3 * (2 * model.num_matmul_weights * sum(lens) + attention)


def peak_flops(device: torch.device) -> float | None:
    """Of the card, if it is a known one."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
