"""Qwen3, dense: a Llama-like decoder with RMS norms on every query and key head."""

from typing import Any

from samebit.rollout.models.config import ModelConfig, decoder_config

ARCHITECTURE = "Qwen3ForCausalLM"


def config_from_hf(hf: Any) -> ModelConfig:
    """Sizes from a transformers Qwen3Config."""
    return decoder_config(hf, ARCHITECTURE, qk_norm=True)
