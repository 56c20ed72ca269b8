"""Task `file`: problems from a .jsonl or .parquet file of records."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from samebit.recipes.data.tasks.base import DataConfig, Dataset, Problem
from samebit.recipes.data.tasks.faults import raise_faults
from samebit.recipes.data.tasks.readers import Record, plain, read_jsonl, read_parquet

logger = logging.getLogger(__name__)


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Read the train and held-out records.

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
    return _numbered(kept), _numbered(held_out)


def _without(problems: list[Problem], held_out: list[Problem]) -> list[Problem]:
    held = {json.dumps(problem.prompt, sort_keys=True) for problem in held_out}
    return [p for p in problems if json.dumps(p.prompt, sort_keys=True) not in held]


def _numbered(problems: list[Problem]) -> list[Problem]:
    return [p if p.index == i else replace(p, index=i) for i, p in enumerate(problems)]


def _read_problems(path: Path, config: DataConfig) -> list[Problem]:
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path} has the suffix {path.suffix!r}; give a .jsonl or .parquet file")
    if path.is_dir():
        raise IsADirectoryError(f"data file {path} is a folder; give a .jsonl or .parquet file")
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist (from {Path.cwd()})")
    faults, problems = list[str](), list[Problem]()
    read = read_jsonl if path.suffix == ".jsonl" else read_parquet
    for record in read(path, faults):
        try:
            problems.append(_problem(len(problems), record, config))
        except ValueError as error:
            faults.append(str(error))
    raise_faults(faults)
    if not problems:
        raise ValueError(f"{path} holds no record; give at least one")
    return problems


def _problem(index: int, record: Record, config: DataConfig) -> Problem:
    where, values = record.where, record.values
    prompt = _prompt(_lookup(values, config.prompt_key, where), f"{where}: {config.prompt_key!r}")
    label = _lookup(values, config.label_key, where)
    text = record.number_text(label, config.label_key)
    if text is None and isinstance(label, str):
        text = label
    if text is None:
        what = f"{where}: {config.label_key!r}"
        raise ValueError(f"{what} is {label!r:.80}; give a text or a number")
    for part in (text, *_texts(prompt)):
        if fault := lone_surrogate(part):
            raise ValueError(f"{where} holds {fault}")
    metadata = {key: plain(_lookup(values, key, where)) for key in config.metadata_keys}
    return Problem(index=index, prompt=prompt, label=text, metadata=metadata, where=where)


def _texts(prompt: str | list[dict[str, str]]) -> list[str]:
    if isinstance(prompt, str):
        return [prompt]
    return [text for message in prompt for text in message.values()]


def lone_surrogate(text: str) -> str:
    """Name half of a UTF-16 pair, which no encoding of a text has; empty if there is none."""
    found = None if text.isascii() else re.search("[\ud800-\udfff]", text)
    return f"the lone surrogate \\u{ord(found[0]):04x}, which is no character" if found else ""


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
