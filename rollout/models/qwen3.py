"""Qwen3, dense: a Llama-like decoder with RMS norms on every query and key head."""

from samebit.rollout.models.config import Family
from samebit.rollout.models.decoder import DenseModel


class Qwen3(DenseModel):
    family = Family(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        explicit=("num_key_value_heads", "head_dim"),
    )
    qk_norm = True
