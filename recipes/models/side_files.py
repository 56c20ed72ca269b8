"""The files of a Hugging Face folder that are not weights: config, tokenizer, templates."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from samebit.recipes.run.input_files import CHAT_TEMPLATES

_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".index.json",
)
_OWN = "weight_version.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")


def side_files(folder: Path) -> list[Path]:
    """Every regular file of the folder besides weights and hidden ones, and its chat templates."""
    return [
        file
        for file in [*sorted(folder.iterdir()), *sorted((folder / CHAT_TEMPLATES).glob("*"))]
        if file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(_WEIGHT_SUFFIXES)
        and file.name != _OWN
    ]


def write_side_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy them; config.json says what the weights beside it are: of this dtype."""
    for file in side_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    config = target / "config.json"
    found = json.loads(config.read_bytes())
    described = describe(found, dtype)
    if described != found:  # else the very bytes stay
        config.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")


def describe(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json of weights of this dtype, under the key that it uses."""
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in _DTYPE_KEYS if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, name)
