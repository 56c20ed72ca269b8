"""From the command line to a recipe's configuration: Hydra composes, mistakes are explained."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from samebit.recipes.bench.config import BenchEngineRun, BenchKernelsRun, BenchTrainerRun
from samebit.recipes.config import (
    DemoRun,
    DiffRun,
    ExportRun,
    FetchRun,
    GrpoRun,
    RunSection,
    SftRun,
    VerifyRun,
)

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

SCHEMAS: dict[str, type[Any]] = {
    "grpo": GrpoRun,
    "sft": SftRun,
    "demo": DemoRun,
    "verify": VerifyRun,
    "bench engine": BenchEngineRun,
    "bench kernels": BenchKernelsRun,
    "bench trainer": BenchTrainerRun,
    "diff": DiffRun,
    "export": ExportRun,
    "fetch-smollm2": FetchRun,
}

_ARGS = re.compile(r"((sft|grpo)\.)?(data|reward)\.args(\.\w+)*=")


class ConfigError(ValueError):
    """A configuration key is unknown, missing, of the wrong type or contradicts another."""


def compose(command: str, overrides: Sequence[str]) -> Any:
    """The composed OmegaConf config of a command; ConfigError for keys that do not exist."""
    from hydra import compose as hydra_compose
    from hydra import initialize, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        own = override.lstrip("+")
        if "=" not in own or own[0] == "~" or (own != override and not _ARGS.match(own)):
            raise ConfigError(f"'{override}' is no key=value of an existing key")
    # Arguments of a task or a reward are whatever it takes: they may be new keys.
    overrides = [f"++{o}" if _ARGS.match(o) else o for o in overrides]
    ConfigStore.instance().store(name=f"{command}_schema", node=SCHEMAS[command])
    has_groups = (CONFIG_DIR / f"{command}.yaml").exists()
    where = (
        initialize_config_dir(str(CONFIG_DIR), version_base="1.3")
        if has_groups
        else initialize(config_path=None, version_base="1.3")
    )
    try:
        with where:
            return hydra_compose(command if has_groups else f"{command}_schema", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(command, error)) from error


def resolve(command: str, overrides: Sequence[str]) -> Any:
    """The command's dataclass, filled and checked; ConfigError says what is wrong."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen = _demo_by_device(overrides) if command == "demo" else []
    config = compose(command, [*chosen, *overrides])
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"required: {', '.join(f'{key}=...' for key in missing)}")
    try:
        run: Any = OmegaConf.to_object(config)
        if isinstance(run, RunSection):
            run.validate()
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    return run


def _demo_by_device(overrides: Sequence[str]) -> list[str]:
    """The larger demo where torch finds a GPU, unless the command line decides."""
    given = dict(o.split("=", 1) for o in overrides if "=" in o)
    if "demo" in given or given.get("device", "").startswith("cpu"):
        return []
    import torch

    return ["demo=smollm2"] if torch.cuda.is_available() else []


def to_yaml(run: RunSection) -> str:
    """The resolved configuration as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(run))


def to_dict(run: RunSection) -> dict[str, Any]:
    """The resolved configuration as plain values."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.structured(run))  # type: ignore[return-value]


def _explain(command: str, error: Exception) -> str:
    """The first line of Hydra's message, with the nearest key that does exist."""
    cause = error.__cause__ or error
    lines = [str(error).splitlines()[0]]
    if cause is not error and "not in" not in str(cause):
        lines.append(str(cause).splitlines()[0])
    if "Available options" in str(error):
        lines = [" ".join(str(error).split("Config search path")[0].split())]
    text = ": ".join(lines).replace("Could not override", "unknown key:")
    if "Did you mean" in text or "could not be converted" in text:
        return text
    key = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
    if key is None:
        return text
    near = difflib.get_close_matches(str(key), _all_keys(SCHEMAS[command]), n=3, cutoff=0.5)
    return text + (f" Did you mean: {', '.join(near)}?" if near else "")


def _all_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        if is_dataclass(f.type):
            keys += _all_keys(f.type, f"{prefix}{f.name}.")
    return keys
