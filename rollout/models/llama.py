"""Llama 2 and 3, SmolLM2 and their kin: grouped-query attention, SwiGLU, no biases."""

from typing import Any

from samebit.rollout.models.config import ModelConfig, decoder_config

ARCHITECTURE = "LlamaForCausalLM"


def config_from_hf(hf: Any) -> ModelConfig:
    """Sizes from a transformers LlamaConfig."""
    return decoder_config(hf, ARCHITECTURE, qk_norm=False)
