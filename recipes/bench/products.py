"""The matrix products of a model, which `bench kernels` times and tunes."""

from samebit.rollout.models.config import ModelConfig

HEAD = "lm_head"


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of every product of the model."""
    shapes = {name: (product.n, product.k) for name, product in config.layer_products.items()}
    return shapes | {HEAD: (config.vocab_size, config.hidden_size)}
