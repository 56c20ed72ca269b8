"""From a Hugging Face architecture name to the file that knows it."""

from pathlib import Path

from samebit.rollout.models import llama, qwen3
from samebit.rollout.models.config import ModelConfig, read_hf_config

MODELS = {module.ARCHITECTURE: module for module in (llama, qwen3)}


def load_model_config(model_path: str | Path) -> ModelConfig:
    """ModelConfig of a local Hugging Face folder; ValueError for an unknown architecture."""
    hf = read_hf_config(Path(model_path))
    names = hf.architectures or []
    known = [name for name in names if name in MODELS]
    if not known:
        raise ValueError(
            f"{model_path}/config.json: architectures = {names}; known: {', '.join(sorted(MODELS))}"
        )
    return MODELS[known[0]].config_from_hf(hf)
