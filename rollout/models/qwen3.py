"""Qwen3, dense: a Llama-like decoder with RMS norms on every query and key head."""

from samebit.rollout.models.config import Family

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    qk_norm=True,
    explicit=("num_key_value_heads", "head_dim"),
)
