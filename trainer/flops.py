"""Floating-point operations of training, and the share of the hardware's that they are (MFU).

Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: 6 operations a token and weight, plus
attention, here causal. Activations computed again do not count.
"""

from collections.abc import Iterable

import torch

from samebit.rollout.models.config import ModelConfig

# By the card's whole name: a PCIe card, another form or a slice of one has other figures.
_PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
PEAK_SOURCE = "dense bf16, by the data sheets of H100 SXM and H200"


def num_matmul_weights(model: ModelConfig) -> int:
    """Weights that multiply every token: all but norms and the embedding's lookup."""
    heads = model.num_heads + 2 * model.num_kv_heads
    attention = model.hidden_size * model.head_dim * (heads + model.num_heads)
    layer = attention + 3 * model.hidden_size * model.ffn_size
    return model.num_layers * layer + model.hidden_size * model.vocab_size


def attention_flops(model: ModelConfig, length: int) -> int:
    """Of one sequence's causal attention, forward: two products over half of all pairs."""
    return 2 * model.num_layers * model.num_heads * model.head_dim * length**2


def train_flops(model: ModelConfig, seq_lens: Iterable[int]) -> int:
    """Of one forward and backward over sequences of these lengths."""
    lens = list(seq_lens)
    attention = sum(attention_flops(model, n) for n in lens)
    return 3 * (2 * num_matmul_weights(model) * sum(lens) + attention)


def peak_flops(device: torch.device) -> float | None:
    """Of the card, if it is a known one; see PEAK_SOURCE."""
    return card_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def card_peak(name: str) -> float | None:
    """Of a card by its name, if it is a known one."""
    return _PEAK_FLOPS.get(name)
