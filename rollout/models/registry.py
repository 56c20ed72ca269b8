"""From a Hugging Face folder to its model, whose family one of the files here knows."""

from pathlib import Path

from samebit.kernels.named import import_class
from samebit.rollout.models.config import RATES, Family, ModelConfig, read_folder
from samebit.rollout.models.json_file import JsonFile
from samebit.rollout.models.llama import Llama
from samebit.rollout.models.qwen2 import Qwen2
from samebit.rollout.models.qwen3 import Qwen3
from samebit.rollout.models.stop_tokens import StopTokens

FAMILIES: list[type[ModelConfig]] = [Llama, Qwen2, Qwen3]
"""Those of samebit; own_family adds the user's."""


def own_family(name: str) -> type[ModelConfig]:
    """The family that "module:Class" names, which this process then knows; ValueError for none."""
    found = import_class(name, "model_family", ModelConfig)
    others = [model for model in FAMILIES if model is not found]
    family, taken = getattr(found, "family", None), [x.family.architecture for x in others]
    if not isinstance(family, Family) or family.architecture in taken:
        what = f"`family` must be a Family whose architecture is none of {', '.join(taken)}"
        raise ValueError(f"model_family is {name!r}; its {what}")
    FAMILIES[:] = [*others, found]
    return found


def has_value_head(model_path: str | Path) -> bool:
    """Whether a folder says that its output layer gives labels, as that of a reward model."""
    file = Path(model_path) / "config.json"
    names = JsonFile.read(file).values.get("architectures") if file.exists() else None
    return isinstance(names, list) and any(str(name).endswith(RATES) for name in names)


def load_model_config(
    model_path: str | Path, family: str | None = None, rates: bool = False
) -> ModelConfig:
    """The model of a local Hugging Face folder; it must be of `family`, a user's, if that is given.

    rates: its output layer has to be a value head.
    Raises FileNotFoundError for what is missing, and ValueError that names file, key and value for
    what cannot be read or is not computed here.
    """
    if family is None:
        return read_folder(Path(model_path), FAMILIES, rates)[0]
    own = own_family(family)
    try:
        return read_folder(Path(model_path), [own], rates)[0]
    except ValueError as error:
        raise ValueError(f"model_family is {family!r}: {error}") from error


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
