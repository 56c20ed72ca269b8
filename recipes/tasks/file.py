"""Task `file`: problems from a .jsonl or .parquet file of records."""

import json
import logging
from pathlib import Path
from typing import Any

from samebit.recipes.tasks.base import DataConfig, Dataset, ListDataset, Problem

logger = logging.getLogger(__name__)


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """The train and held-out records.

    A training record whose prompt is also held out is left out of the train split, with a warning.
    Raises FileNotFoundError for a missing file; ValueError for a bad record (naming it) or
    where no training record is left.
    """
    if not config.path:
        raise ValueError("data.path is unset; give the .jsonl or .parquet file of training records")
    if config.args:
        raise ValueError(f"data.args is {config.args}; the task 'file' takes none")
    problems = _read_problems(Path(config.path), config)
    if config.eval_path:
        held_out = _read_problems(Path(config.eval_path), config)
    else:
        first = len(problems) - config.eval_size
        if first < 1:
            raise ValueError(
                f"data.eval_size is {config.eval_size} and {config.path} has {len(problems)} "
                f"records, which leaves none to train on; give at most {len(problems) - 1}, or set "
                "data.eval_path"
            )
        problems, held_out = problems[:first], problems[first:]
    kept = _without(problems, held_out)
    if not kept:
        raise ValueError(f"every training prompt of data.path {config.path} is also a held-out one")
    if len(kept) < len(problems):
        dropped = len(problems) - len(kept)
        logger.warning("%d records of %s are held out too: not trained on", dropped, config.path)
    return ListDataset(_numbered(kept)), ListDataset(_numbered(held_out))


def _without(problems: list[Problem], held_out: list[Problem]) -> list[Problem]:
    held = {json.dumps(problem.prompt, sort_keys=True) for problem in held_out}
    return [p for p in problems if json.dumps(p.prompt, sort_keys=True) not in held]


def _numbered(problems: list[Problem]) -> list[Problem]:
    return [
        Problem(index=i, prompt=p.prompt, label=p.label, metadata=p.metadata)
        for i, p in enumerate(problems)
    ]


def _read_problems(path: Path, config: DataConfig) -> list[Problem]:
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path} has the suffix {path.suffix!r}; give a .jsonl or .parquet file")
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist (from {Path.cwd()})")
    records = _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)
    if not records:
        raise ValueError(f"{path} holds no record; give at least one")
    return [
        _problem(index, record, f"{path}, {where}", config)
        for index, (where, record) in enumerate(records)
    ]


def _read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each record with where it stands ("line 3"). Blank lines are skipped."""
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}, line {number} is a JSON {type(record).__name__}; give an object"
                )
            records.append((f"line {number}", record))
    return records


def _read_parquet(path: Path) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    return [(f"row {number}", row) for number, row in enumerate(rows)]


def _problem(index: int, record: dict[str, Any], where: str, config: DataConfig) -> Problem:
    prompt = _prompt(_lookup(record, config.prompt_key, where), f"{where}: {config.prompt_key!r}")
    label = _label(_lookup(record, config.label_key, where), f"{where}: {config.label_key!r}")
    metadata = {key: _lookup(record, key, where) for key in config.metadata_keys}
    return Problem(index=index, prompt=prompt, label=label, metadata=metadata)


def _lookup(record: dict[str, Any], key: str, where: str) -> Any:
    """The value at a key, which is taken whole first and as a dotted path second."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{where} has no {key!r}; its keys are {sorted(record)}")
        value = value[part]
    return value


def _prompt(value: Any, what: str) -> str | list[dict[str, str]]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        return [_message(message, what) for message in value]
    raise ValueError(f"{what} is {value!r:.80}; give a text or a list of chat messages")


def _message(message: Any, what: str) -> dict[str, str]:
    if isinstance(message, dict):
        # Parquet gives every message every field of the column, None where a message lacks it.
        message = {key: value for key, value in message.items() if value is not None}
        texts = all(isinstance(value, str) for value in message.values())
        if texts and {"role", "content"} <= message.keys():
            return message
    raise ValueError(f"{what} has the message {message!r:.80}; give texts `role` and `content`")


def _label(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{what} is {value!r:.80}; give a text or a number")
    return str(value)
