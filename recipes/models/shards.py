"""Whether tensor parallel ranks can share a model. Nothing is loaded."""

from samebit.rollout.models.config import ModelConfig


def require_shards(model: ModelConfig, size: int, key: str) -> None:
    """Raise ValueError, naming the key of `size`, for so many tensor parallel ranks that cannot
    share the model equally."""
    try:
        model.param_specs((0, size))
    except ValueError as error:
        raise ValueError(f"{key} is {size}: {error}") from error
