"""Qwen2 and Qwen2.5, dense: a Llama-like decoder with biases on queries, keys and values.

Sliding windows and dual chunk attention are refused: layers would attend to other tokens.
"""

from samebit.rollout.models.config import Family
from samebit.rollout.models.decoder import DenseModel


class Qwen2(DenseModel):
    family = Family(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        explicit=("num_key_value_heads",),
        without_effect={"use_mrope": (False,), "dual_chunk_attention_config": ()},
    )
    qkv_bias = True
