"""The files of a Hugging Face folder that are not weights: config, tokenizer, templates."""

from pathlib import Path

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".index.json")
_OWN = "weight_version.json"


def side_files(folder: Path) -> list[Path]:
    """Every regular file of the folder besides weights."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and file.name != _OWN
    ]
