"""From the command line to a recipe's configuration: Hydra composes, mistakes are explained."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    InterpolationValidationError,
    OmegaConfBaseException,
)

from samebit.recipes.bench.config import (
    BenchDraftRun,
    BenchEngineRun,
    BenchKernelsRun,
    BenchMemoryRun,
    BenchSpeculativeRun,
    BenchSyncRun,
    BenchTrainerRun,
)
from samebit.recipes.cli.overrides import (
    Overrides,
    check_file,
    find_field,
    read_words,
    wrong_flags,
)
from samebit.recipes.config import (
    ConfigError,
    DpoRun,
    GrpoRun,
    RunSection,
    SftRun,
    grpo_run_of,
)
from samebit.recipes.demo_config import DemoRun
from samebit.recipes.eagle3_config import Eagle3Run
from samebit.recipes.plan_config import PlanRun
from samebit.recipes.run.secrets import build
from samebit.recipes.submit_config import SubmitRun
from samebit.recipes.tools_config import (
    DiffRun,
    ExportRun,
    FetchRun,
    ReplayRun,
    ReportRun,
    VerifyRun,
    WatchRun,
)
from samebit.trainer.algorithms.registry import find_algorithm
from samebit.trainer.config import GrpoConfig

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

_OF_ANOTHER_TYPE = "what it gives is not of this key's type"

SCHEMAS: dict[str, type[Any]] = {
    "grpo": GrpoRun,
    "plan": PlanRun,
    "sft": SftRun,
    "dpo": DpoRun,
    "eagle3": Eagle3Run,
    "demo": DemoRun,
    "verify": VerifyRun,
    "bench draft": BenchDraftRun,
    "bench engine": BenchEngineRun,
    "bench kernels": BenchKernelsRun,
    "bench memory": BenchMemoryRun,
    "bench speculative": BenchSpeculativeRun,
    "bench sync": BenchSyncRun,
    "bench trainer": BenchTrainerRun,
    "diff": DiffRun,
    "replay": ReplayRun,
    "report": ReportRun,
    "watch": WatchRun,
    "submit": SubmitRun,
    "export": ExportRun,
    "fetch-smollm2": FetchRun,
}


def groups_of(command: str) -> dict[str, list[str]]:
    """Return the groups of configuration files that a command chooses from, with their choices."""
    return {
        group: sorted(file.stem for file in (CONFIG_DIR / folder).glob("*.yaml"))
        for group, folder in _folders_of(command).items()
    }


def _folders_of(command: str) -> dict[str, str]:
    """The folder of each group: of `experiment` the command's own, such as experiment/sft."""
    main_file = CONFIG_DIR / f"{command}.yaml"
    config: Any = OmegaConf.load(main_file) if main_file.exists() else {}
    parts = [d for d in config.get("defaults", []) if not isinstance(d, str)]
    folders = sorted(str(key).removeprefix("optional ") for part in parts for key in part)
    return {folder.partition("/")[0]: folder for folder in folders}


def compose(command: str, words: Sequence[str]) -> Any:
    """Return a command's OmegaConf config; raises ConfigError for keys that do not exist."""
    schema = schema_of(command, words)
    return _composed(command, schema, read_words(words, schema, groups_of(command)))


def schema_of(command: str, words: Sequence[str]) -> type[Any]:
    """Return the command's dataclass; those of GRPO runs have the named algorithm's settings."""
    schema = SCHEMAS[command]
    if not issubclass(schema, GrpoRun) or (name := _algorithm_name(words)) == GrpoConfig.name:
        return schema
    try:
        return grpo_run_of(find_algorithm(name).Config, name, schema)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _algorithm_name(words: Sequence[str]) -> str:
    """What the last word algorithm.name=... says, or else the chosen files."""
    given = [word.partition("=") for word in words]
    if names := [value for key, _, value in given if key == "algorithm.name"]:
        return names[-1]
    choices = [f"{k}={v}" for k, _, v in given if k in ("algorithm", "experiment")]
    config: Any = {}
    with suppress(HydraException):  # which says it once more when the whole is composed
        config = _by_hydra("grpo", {}, choices) if choices else {}
    return config.get("algorithm", {}).get("name", GrpoConfig.name)


def _by_hydra(command: str, schema: Any, choices: list[str]) -> Any:
    """The command's file and groups over a schema."""
    folders = _folders_of(command)
    named = (choice.partition("=") for choice in choices)
    choices = [f"{folders[group]}={name}" for group, _, name in named]
    ConfigStore.instance().store(name=f"{command}_schema", node=schema)
    has_groups = (CONFIG_DIR / f"{command}.yaml").exists()
    where = (
        initialize_config_dir(str(CONFIG_DIR), version_base="1.3")
        if has_groups
        else initialize(config_path=None, version_base="1.3")
    )
    with where:
        return hydra_compose(command if has_groups else f"{command}_schema", choices)


def _composed(command: str, schema: type[Any], given: Overrides) -> Any:
    folders = _folders_of(command)
    for group, _, name in (choice.partition("=") for choice in given.choices):
        file = CONFIG_DIR / folders[group] / f"{name}.yaml"
        if file.exists():
            check_file(file, schema)
    try:
        config = _by_hydra(command, schema, given.choices)
    except HydraException as error:
        raise ConfigError(_first_lines(error)) from error
    for key, value in given.values:
        _set(config, schema, key, value)
    return config


def _set(config: Any, schema: Any, key: str, value: Any) -> None:
    named, section = find_field(schema, key), key.rpartition(".")[0]
    assert named is not None
    try:
        if section and not named.is_free and OmegaConf.select(config, section) is None:
            raise ConfigError(f"{key} is given, but {section} is null")
        OmegaConf.update(config, key, value, merge=True, force_add=named.is_free)
    except OmegaConfBaseException as error:
        if named.kind in (int, float, bool, list[int]):
            raise ConfigError(f"{key} is {value!r}; it must be {named.words}") from error
        right = "" if named.element is None else f"; it must be {named.words}"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}{right}") from error


def resolve(command: str, words: Sequence[str]) -> Any:
    """Return the command's dataclass, filled and checked; raises ConfigError if it cannot."""
    schema = schema_of(command, words)
    given = read_words(words, schema, groups_of(command))
    if command == "demo":
        given.choices[:0] = _demo_by_device(given)
    config = _composed(command, schema, given)
    raw: Any = OmegaConf.to_container(config)
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_value(config, error)) from error
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"required: {', '.join(f'{key}=...' for key in missing)}")
    untyped: Any = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    if wrong := next(wrong_flags(schema, untyped), None):
        raise ConfigError(_interpolated(config, wrong, _OF_ANOTHER_TYPE))
    try:
        run = build(schema, values, raw)
        if isinstance(run, RunSection):
            run.validate()
        for key, value in _infinite(run):
            raise ValueError(f"{key} is {value}; it must be finite")
    except ValueError as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    return run


def _infinite(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Keys whose numbers are none; what is free, such as arguments of a user's, may be anything."""
    for each in fields(section):
        value, key = getattr(section, each.name), prefix + each.name
        if is_dataclass(value):
            yield from _infinite(value, f"{key}.")
        elif isinstance(value, list):
            for i, part in enumerate(value):
                if is_dataclass(part):
                    yield from _infinite(part, f"{key}.{i}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield key, value


def _demo_by_device(given: Overrides) -> list[str]:
    """The larger demo where torch finds a GPU, unless the command line decides."""
    if given.choices or str(given.given("device")).startswith("cpu"):
        return []
    import torch

    return ["demo=smollm2"] if torch.cuda.is_available() else []


def _first_lines(error: Exception) -> str:
    """Of Hydra's message and of its cause."""
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    return ": ".join(str(cause).splitlines()[0] for cause in causes)


def _explain_value(config: Any, error: Any) -> str:
    """Which key has an interpolation that gives nothing, or nothing of its type."""
    said = str(error).splitlines()[0]
    resolved = isinstance(error, InterpolationValidationError)  # its message has the value
    if isinstance(error, InterpolationResolutionError) and not resolved:
        cause = error.__cause__
        said = str(cause).splitlines()[0] if cause is not None else said
        said = said.removeprefix("KeyError raised while resolving interpolation: ").strip("\"'")
    elif resolved:
        said = _OF_ANOTHER_TYPE
    return _interpolated(config, str(error.full_key), said)


def _interpolated(config: Any, key: str, said: str) -> str:
    raw = _leaf(OmegaConf.to_container(config), key)
    return f"{key}={raw}: {said}; \\${{...}} would be the text itself"


def _leaf(values: Any, key: str) -> Any:
    for part in key.replace("[", ".").replace("]", "").split("."):
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, list) and part.isdigit():
            values = values[int(part)]
    return values
