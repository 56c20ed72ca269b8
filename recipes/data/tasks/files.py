"""Which files of records a path means: one file, a folder of one kind, a saved Hugging Face set."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KINDS = (".jsonl", ".parquet", ".arrow")
BY_PYARROW = (".parquet", ".arrow")
RIGHT = (
    "give a .jsonl, .parquet or .arrow file, a folder of them, or a pattern such as train-*.jsonl"
)
_OF_TRAIN = "FOLDER/*train*"
_STATE, _DICT = "state.json", "dataset_dict.json"
_SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})(?:-[0-9a-f]{16})?")
_SPLIT = re.compile(r"(?<![a-z])(train|test|valid|validation|val|dev|eval)(?![a-z])", re.IGNORECASE)


def list_files(path: Path) -> list[Path]:
    """Return the files of records that a path means, in order.

    Of a folder all visible files by name, of a pattern those in its folder that it fits; of a
    Hugging Face data set that `save_to_disk` wrote those that its state.json lists. Raises
    FileNotFoundError if there is none, and ValueError for what is ambiguous: files of several
    kinds, of several splits, or that hold no records.
    """
    if _is_pattern(path):
        return _of_one_set(path, _fitting(path))
    if path.is_dir():
        return _saved(path) if (path / _STATE).exists() else _visible(path)
    if path.suffix not in KINDS and (path.suffix or path.exists()):
        raise ValueError(f"{path} has the suffix {path.suffix!r}; {RIGHT}")
    if not path.is_file():
        what = "file" if path.suffix else "folder"
        raise FileNotFoundError(f"data {what} {path} does not exist (from {Path.cwd()})")
    return [path]


def kinds_at(path: Path) -> set[str]:
    """Return the suffixes of what is at a path, which need not be there."""
    names = fitting(path) if path.is_dir() or _is_pattern(path) else [path]
    return {name.suffix for name in names} & set(KINDS)


def fitting(path: Path) -> list[Path]:
    """Return what is there of a path by itself: what lies in a folder, or what a pattern fits."""
    if _is_pattern(path):
        return _fitting(path)
    return sorted(path.iterdir()) if path.is_dir() else []


def _is_pattern(path: Path) -> bool:
    return bool(set("*?[") & set(path.name)) and not path.exists()


def _fitting(pattern: Path) -> list[Path]:
    """What a pattern means in its folder, by name."""
    return sorted(p for p in pattern.parent.glob(pattern.name) if not p.name.startswith("."))


def _visible(folder: Path) -> list[Path]:
    if (folder / _DICT).exists():
        names = sorted(part.name for part in folder.iterdir() if (part / _STATE).exists())
        raise ValueError(f"{folder} holds the splits {_listed(names)}; give the folder of one")
    return _of_one_set(folder, sorted(p for p in folder.iterdir() if not p.name.startswith(".")))


def _of_one_set(place: Path, found: list[Path]) -> list[Path]:
    """The files found at a folder or by a pattern, if they are those of one set of records."""
    foreign = [part.name for part in found if part.suffix not in KINDS or not part.is_file()]
    if foreign:
        raise ValueError(
            f"{place} holds {_listed(foreign)}, which is no file of records; give a folder of "
            f".jsonl, .parquet or .arrow files alone, or a pattern such as {_OF_TRAIN}"
        )
    if not found:
        what = "fits no file" if _is_pattern(place) else "is an empty folder"
        raise FileNotFoundError(f"{place} {what}; {RIGHT}")
    if len(kinds := sorted({part.suffix for part in found})) > 1:
        first = [next(part.name for part in found if part.suffix == kind) for kind in kinds]
        raise ValueError(f"{place} holds files of several kinds, {_listed(first)}; give one kind")
    _require_one_split(place, found)
    _require_whole(place, found)
    return found


def _require_one_split(place: Path, files: list[Path]) -> None:
    """ValueError for files that are called by several splits, as train.parquet and test.parquet."""
    splits = {found[1].lower(): file.name for file in files if (found := _SPLIT.search(file.stem))}
    if len(splits) > 1:
        names = _listed(sorted(splits.values()))
        raise ValueError(
            f"{place} holds files of several splits, {names}; give those of one: a file, or a "
            f"pattern such as {_OF_TRAIN}"
        )


def _require_whole(place: Path, files: list[Path]) -> None:
    """ValueError for shards (train-00000-of-00002.parquet) of several splits, or too few."""
    shards = [found for file in files if (found := _SHARD.fullmatch(file.stem))]
    splits = {shard[1] for shard in shards}
    if len(splits) > 1:
        raise ValueError(
            f"{place} holds shards of {_listed(sorted(splits))}; give those of one, by a pattern "
            f"such as {_OF_TRAIN}"
        )
    if not shards:
        return
    if len(shards) < len(files):
        other = next(file.name for file in files if not _SHARD.fullmatch(file.stem))
        raise ValueError(f"{place} holds {other} beside shards; give a folder of shards alone")
    counts = {int(shard[3]) for shard in shards}
    numbers = sorted(int(shard[2]) for shard in shards)
    missing = [i for i in range(max(counts)) if i not in numbers]
    if len(counts) > 1 or numbers != list(range(max(counts))):
        what = f"lacks shard {missing[0]}" if missing else "holds shards of several sets"
        raise ValueError(f"{place} {what} of {max(counts)} of {shards[0][1]!r}; give all of one")


def _saved(folder: Path) -> list[Path]:
    """The files of a Hugging Face data set on disk; others there are its caches."""
    state = _read_state(folder / _STATE)
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder / _STATE} selects rows by _indices_data_files, as datasets before 2.0 did; "
            "save it again with a present version"
        )
    entries = state.get("_data_files")
    listed = entries if isinstance(entries, list) else []
    names = [str(x["filename"]) for x in listed if isinstance(x, dict) and "filename" in x]
    if not names or len(names) < len(listed):
        raise ValueError(
            f"{folder / _STATE}: _data_files is {entries!r:.80}; it must be a list of "
            '{"filename": ...}, as datasets.Dataset.save_to_disk writes it'
        )
    files = [folder / name for name in names]
    for file in files:
        if file.suffix != ".arrow" or not file.is_file():
            raise FileNotFoundError(f"{folder / _STATE} lists {file.name}, no .arrow file there")
    return files


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} is a JSON {type(state).__name__}; give an object")
    return state


def _listed(names: Iterable[str]) -> str:
    first, more = list(names)[:4], len(list(names)) - 4
    return ", ".join([*first, *([f"{more} more"] if more > 0 else [])])
