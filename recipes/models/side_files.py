"""The files of a Hugging Face folder that are not weights: config, tokenizer, templates."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from samebit.weight_sync.transports.file import VERSION_FILE

CHAT_TEMPLATES = "additional_chat_templates"
"""The one folder inside a Hugging Face folder of which a tokenizer reads files."""
_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".gguf", ".index.json",
)  # fmt: skip
_DTYPE_KEYS = ("dtype", "torch_dtype")


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return what a tokenizer reads of a Hugging Face folder, chat templates included, by name."""
    files = [folder / name for name in _TOKENIZER]
    files += sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))
    return {str(file.relative_to(folder)): file for file in files if file.is_file()}


def side_files(folder: Path) -> list[Path]:
    """Return all regular files of the folder but weights and hidden ones, and chat templates."""
    return [
        file
        for file in [*sorted(folder.iterdir()), *sorted((folder / CHAT_TEMPLATES).glob("*"))]
        if file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(_WEIGHT_SUFFIXES)
        and file.name != VERSION_FILE
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
    """Return a config.json that names this dtype, under the key that it uses."""
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in _DTYPE_KEYS if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, name)
