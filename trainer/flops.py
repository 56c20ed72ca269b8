"""Floating-point operations of training, and the share of the hardware's that they are (MFU).

Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: 6 operations a token and weight, plus
attention, here causal. Activations computed again do not count.
"""

from collections.abc import Iterable

import torch

from samebit.rollout.models.config import ModelConfig

# Dense bf16, from the vendor's data sheets, by a part of the card's name.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


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
    """Of the card, if it is a known one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in _PEAK_FLOPS.items() if card in name), None)
