"""The matrix products of a model, which `bench kernels` times and tunes."""

from samebit.rollout.models.config import ModelConfig


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of every product of the model."""
    D, H = config.hidden_size, config.head_dim
    heads = config.num_heads * H
    return {
        "qkv": (heads + 2 * config.num_kv_heads * H, D),
        "o": (D, heads),
        "gate_up": (2 * config.ffn_size, D),
        "down": (D, config.ffn_size),
        "lm_head": (config.vocab_size, D),
    }
