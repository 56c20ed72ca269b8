"""Task `file`: problems from files of records, of one source or of several that are mixed."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from samebit.recipes.data.tasks.base import (
    ChatPrompt,
    DataConfig,
    Dataset,
    DataSource,
    MixedRecords,
    PreferenceConfig,
    Problem,
    SupervisedConfig,
    ends_with_answer,
)
from samebit.recipes.data.tasks.chat import (
    lone_surrogate,
    read_answer,
    read_json_text,
    read_prompt,
    read_tools,
)
from samebit.recipes.data.tasks.faults import raise_faults
from samebit.recipes.data.tasks.files import list_files
from samebit.recipes.data.tasks.filter import load_filter
from samebit.recipes.data.tasks.readers import READERS, Record, plain

logger = logging.getLogger(__name__)

_OWN = ("prompt_key", "label_key", "tools_key", "metadata_keys", "eval_path", "eval_size")


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Read the train and held-out records; of several sources each split is a MixedRecords.

    A training record whose prompt is also held out is left out of the train split, with a warning.
    Raises FileNotFoundError for a missing file; ValueError for a bad record (naming it) or
    where no training record is left.
    """
    if not config.path and not config.sources:
        raise ValueError(
            "data.path is unset; give the file or folder of training records (or data.sources)"
        )
    if config.args:
        raise ValueError(f"data.args is {config.args}; the task 'file' takes none")
    if not config.sources:
        train, held_out = _read_splits(config, "data")
        train = _without(train, held_out, f"data.path {config.path}")
        return _numbered(train), _numbered(held_out)
    return _load_mixed(config)


def _load_mixed(config: DataConfig) -> tuple[Dataset, Dataset]:
    names = [f"data.sources.{i}" for i in range(len(config.sources))]
    own = [_own_config(config, source) for source in config.sources]
    splits = [_read_splits(one, name) for one, name in zip(own, names, strict=True)]
    held_out = [held for _, held in splits]
    if config.eval_path:
        held_out = [_read_problems(Path(config.eval_path), config)]
    every = [problem for part in held_out for problem in part]
    train = [
        _without(part, every, f"{name}.path {one.path}")
        for one, name, (part, _) in zip(own, names, splits, strict=True)
    ]
    weights = [source.weight for source in config.sources]
    if config.eval_path:
        return _mixed(train, weights, names), _numbered(every)
    return _mixed(train, weights, names), _mixed(held_out, weights, names)


def _mixed(parts: list[list[Problem]], weights: list[float], names: list[str]) -> MixedRecords:
    found = MixedRecords(parts, weights, names)
    found[:] = _numbered(found)
    return found


def _own_config(config: DataConfig, source: DataSource) -> DataConfig:
    """The configuration of one source by itself."""
    own = {key: x for key in _OWN if (x := getattr(source, key)) is not None}
    if config.eval_path:  # one for all
        own |= {"eval_path": None, "eval_size": 0}
    return replace(config, sources=[], path=source.path, **own)


def _read_splits(config: DataConfig, key: str) -> tuple[list[Problem], list[Problem]]:
    """To train on and held out, as they are read; `key`: the section's, for errors."""
    assert config.path is not None
    problems = _read_problems(Path(config.path), config)
    if config.eval_path:
        return problems, _read_problems(Path(config.eval_path), config)
    first = len(problems) - config.eval_size
    if first < 1:
        raise ValueError(
            f"{key}.eval_size is {config.eval_size} and {config.path} has {len(problems)} "
            f"records, which leaves none to train on; give at most {len(problems) - 1}, or set "
            f"{key}.eval_path"
        )
    return problems[:first], problems[first:]


def _without(problems: list[Problem], held_out: list[Problem], path: str) -> list[Problem]:
    kept = _not_among(problems, held_out)
    if not kept:
        raise ValueError(f"every training prompt of {path} is also a held-out one")
    if dropped := len(problems) - len(kept):
        logger.warning("%d records of %s are held out too: not trained on", dropped, path)
    return kept


def _not_among(problems: list[Problem], held_out: list[Problem]) -> list[Problem]:
    held = {json.dumps(problem.prompt, sort_keys=True) for problem in held_out}
    return [p for p in problems if json.dumps(p.prompt, sort_keys=True) not in held]


def _numbered(problems: list[Problem]) -> list[Problem]:
    return [p if p.index == i else replace(p, index=i) for i, p in enumerate(problems)]


def _read_problems(path: Path, config: DataConfig) -> list[Problem]:
    keeps, left_out = load_filter(config), 0
    faults, problems = list[str](), list[Problem]()
    for file in list_files(path):
        for record in READERS[file.suffix](file, faults):
            try:
                problem = _problem(len(problems), record, config)
                if keeps(problem):
                    problems.append(problem)
                else:
                    left_out += 1
            except ValueError as error:
                faults.append(str(error))
    raise_faults(faults)
    if left_out:
        what = f"{left_out} of {left_out + len(problems)} records of {path}"
        if not problems:
            raise ValueError(f"data.filter {config.filter!r} leaves {what} out; none is left")
        logger.warning("data.filter leaves %s out", what)
    if not problems:
        raise ValueError(f"{path} holds no record; give at least one")
    return problems


def _problem(index: int, record: Record, config: DataConfig) -> Problem:
    where, values = record.where, record.values
    prompt = _prompt(record, config)
    if isinstance(config, PreferenceConfig):
        text, rejected = _pair(record, prompt, config)
    else:
        text, rejected = _label(record, prompt, config), ""
    tools = list[dict[str, Any]]()
    if config.tools_key is not None:
        value, what = _lookup(values, config.tools_key, where), f"{where}: {config.tools_key!r}"
        tools = read_tools(value, what, columnar=record.columnar)
    if fault := lone_surrogate(text, rejected, prompt, tools):
        raise ValueError(f"{where} holds {fault}")
    metadata = {key: plain(_lookup(values, key, where)) for key in config.metadata_keys}
    return Problem(
        index=index,
        prompt=prompt,
        label=text,
        metadata=metadata,
        rejected=rejected,
        tools=tools,
        where=where,
    )


def _label(record: Record, prompt: str | ChatPrompt, config: DataConfig) -> str:
    """The reference answer; empty where there is none: sft's may be in the chat."""
    key, values = config.label_key, record.values
    if key is None:
        return ""
    if isinstance(config, SupervisedConfig) and ends_with_answer(prompt) and _lacks(values, key):
        return ""
    label = _lookup(values, key, record.where)
    text = record.number_text(label, key)
    if text is None and isinstance(label, str):
        text = label
    if text is None and isinstance(label, list | dict) and not isinstance(config, SupervisedConfig):
        text = read_json_text(label, f"{record.where}: {key!r}", columnar=record.columnar)
    if text is None:
        raise ValueError(f"{record.where}: {key!r} is {label!r:.80}; give a text or a number")
    return text


def _pair(record: Record, prompt: str | ChatPrompt, config: PreferenceConfig) -> tuple[str, str]:
    """The better and the worse answer."""
    keys, where = (config.label_key or "", config.rejected_key), record.where
    if config.chat and isinstance(prompt, str):  # in an answer that is the whole chat
        prompt = [{"role": "user", "content": prompt}]
    found = [_lookup(record.values, key, where) for key in keys]
    numbers = [record.number_text(x, key) for x, key in zip(found, keys, strict=True)]
    chosen, rejected = (
        read_answer(x, prompt, f"{where}: {key!r}", columnar=record.columnar)
        if number is None
        else number
        for x, key, number in zip(found, keys, numbers, strict=True)
    )
    if chosen == rejected:
        raise ValueError(f"{where}: {keys[0]!r} and {keys[1]!r} are the same answer")
    return chosen, rejected


def _prompt(record: Record, config: DataConfig) -> str | ChatPrompt:
    """The prompt; of a pair without one what stands before the last message of the better answer,
    which then is the whole chat."""
    key, values = config.prompt_key, record.values
    if isinstance(config, PreferenceConfig) and _lacks(values, key):
        chosen = _lookup(values, config.label_key or "", record.where)
        if isinstance(chosen, list) and len(chosen) > 1:
            what = f"{record.where}: {config.label_key!r}"
            return read_prompt(chosen[:-1], what, columnar=record.columnar)
    value = _lookup(values, key, record.where)
    return read_prompt(value, f"{record.where}: {key!r}", columnar=record.columnar)


def _lacks(record: dict[str, Any], key: str) -> bool:
    try:
        return _lookup(record, key, "it") is None
    except ValueError:
        return True


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
