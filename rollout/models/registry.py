"""From a Hugging Face folder to its model, whose family one of the files here knows."""

from pathlib import Path

from samebit.rollout.models.config import ModelConfig, read_folder
from samebit.rollout.models.llama import Llama
from samebit.rollout.models.qwen2 import Qwen2
from samebit.rollout.models.qwen3 import Qwen3
from samebit.rollout.models.stop_tokens import StopTokens

FAMILIES: list[type[ModelConfig]] = [Llama, Qwen2, Qwen3]
"""A family of your own is one more: FAMILIES.append(YourModel)."""


def load_model_config(model_path: str | Path) -> ModelConfig:
    """The model of a local Hugging Face folder.

    Raises FileNotFoundError for what is missing, and ValueError that names file, key and value for
    what cannot be read or is not computed here.
    """
    return read_folder(Path(model_path), FAMILIES)[0]


def load_stop_tokens(model_path: str | Path) -> StopTokens:
    """What ends a completion of a folder's model, and where it is said; raises as above."""
    return read_folder(Path(model_path), FAMILIES)[1]


def require_taught_end(model_path: str | Path, eos_token_id: int | None) -> None:
    """ValueError unless the engine stops at the end token of the tokenizer as it was loaded."""
    if eos_token_id is None:
        return
    stop_tokens = load_stop_tokens(model_path)
    if eos_token_id not in stop_tokens.ids:
        right = "add it to eos_token_id of its generation_config.json"
        if not stop_tokens.is_token(eos_token_id):
            right = "give it a tokenizer_config.json whose eos_token is one of the model's"
        raise ValueError(
            f"the tokenizer of {model_path} ends a text with token {eos_token_id}, at which the "
            f"model does not stop ({stop_tokens}); {right}"
        )
