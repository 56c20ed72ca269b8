"""Which files of a model folder are read: those that transformers would read, or none.

model.safetensors; else the shards of model.safetensors.index.json; else one file, or a complete
set of shards without an index. Other *.safetensors files are named once and left alone.
"""

import functools
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from samebit.rollout.models.config import require_no_adapter
from samebit.rollout.models.json_file import JsonFile

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_LFS = b"version https://git-lfs"
_OTHER_FORMATS = ("*.bin", "*.gguf", "*.pth", "*.pt", "*.h5", "*.msgpack")


class WeightLoadError(ValueError):
    """A checkpoint does not hold what the model needs; the message lists every difference."""


def find_tensors(folder: Path) -> dict[str, Path]:
    """File of every tensor of a folder.

    Raises FileNotFoundError if there are no weights, WeightLoadError where it is not plain which
    files are meant or an index does not fit them, ValueError for an adapter.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    require_no_adapter(folder)
    files = sorted(folder.glob("*.safetensors"))
    if absent := [f.name for f in files if not f.exists()]:
        raise FileNotFoundError(f"{folder}: links to files that are absent: {', '.join(absent)}")
    single, index = folder / SINGLE, folder / INDEX
    found: dict[str, Path]
    if index.exists():
        found = _tensors_of_index(index)
        if single.exists() and set(found.values()) != {single}:
            raise WeightLoadError(
                f"{folder} holds both {SINGLE} and {INDEX}: one of them is older; take it away, "
                "with its shards"
            )
    elif single.exists():
        found = _tensors_of([single])
    else:
        found = _tensors_of(_complete_set(folder, files))
    read = set(found.values())
    if idle := [f.name for f in files if f not in read]:
        _say_once(f"{folder}: not read, as in transformers: {', '.join(idle)}")
    return found


def open_file(file: Path) -> Any:
    """A safetensors handle; WeightLoadError for what is none, whole."""
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as content:
        if content.read(len(_LFS)) == _LFS:
            raise WeightLoadError(
                f"{file} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder"
            )
    if file.stat().st_size == 0:
        raise WeightLoadError(f"{file} is empty; it must hold safetensors")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise WeightLoadError(f"{file} is damaged, or no safetensors: {error}") from error


def _tensors_of(files: Sequence[Path]) -> dict[str, Path]:
    """By the files' own headers; no tensor may be in two."""
    found: dict[str, Path] = {}
    for file in files:
        with open_file(file) as handle:
            names = list(handle.keys())
        for name in names:
            if name in found:
                raise WeightLoadError(
                    f"{file.parent}: {name} is both in {found[name].name} and in {file.name}"
                )
        found |= dict.fromkeys(names, file)
    return found


def _complete_set(folder: Path, files: Sequence[Path]) -> Sequence[Path]:
    """Without model.safetensors and an index: one file, or all of model-0000i-of-0000n."""
    if not files:
        others = sorted(f.name for kind in _OTHER_FORMATS for f in folder.glob(kind))
        hint = ""
        if others:
            hint = (
                f": it holds {', '.join(others[:5])}, which is not read; convert it (transformers: "
                "from_pretrained, then save_pretrained)"
            )
        raise FileNotFoundError(f"{folder} holds no *.safetensors file{hint}")
    names = [f.name for f in files]
    shards = [m for name in names if (m := _SHARD.fullmatch(name))]
    if len(files) == 1 and not shards:
        return files
    totals = {m[2] for m in shards}
    if len(shards) < len(files) or len(totals) > 1:
        raise WeightLoadError(
            f"{folder} holds neither {SINGLE} nor {INDEX}, and {', '.join(names)} are no one set "
            "model-0000i-of-0000n.safetensors: leave one set"
        )
    [total] = totals
    wanted = [f"model-{i:05d}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
    if absent := [name for name in wanted if name not in names]:
        raise WeightLoadError(f"{folder} lacks {', '.join(absent)} of a set of {int(total)} shards")
    return files


def _tensors_of_index(index: Path) -> dict[str, Path]:
    """As the index says, and as its shards confirm."""
    try:
        weight_map = JsonFile.read(index).require("weight_map", _is_map, "a map of tensor to file")
    except ValueError as error:
        raise WeightLoadError(str(error)) from None
    for name, file in weight_map.items():
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise WeightLoadError(
                f"{index}: {name} is in {file!r}; it must be a *.safetensors file of the folder"
            )
    files = sorted(set(weight_map.values()))
    absent = [f for f in files if not (index.parent / f).is_file()]
    if absent:
        leave = f"; if {SINGLE} is the model, take the index away"
        raise FileNotFoundError(
            f"{index} names files that are absent: {', '.join(absent)}"
            + (leave if (index.parent / SINGLE).exists() else "")
        )
    for file in files:
        _require_fit(index, file, {name for name, f in weight_map.items() if f == file})
    return {name: index.parent / file for name, file in weight_map.items()}


def _require_fit(index: Path, file: str, named: set[str]) -> None:
    with open_file(index.parent / file) as handle:
        held = set(handle.keys())
    held = {name for name in held if name in named or not name.endswith(IGNORED_SUFFIXES)}
    for names, what in ((named - held, "does not hold"), (held - named, "holds besides")):
        if names:
            raise WeightLoadError(
                f"{index.parent}: {file} {what} what {index.name} names: {_first(names)}"
            )


def _first(names: set[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + rest


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(file, str) for file in value.values())


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
