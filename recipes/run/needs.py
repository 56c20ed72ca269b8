"""What a run needs of the machine beside its inputs: packages, and a login for wandb.

Found out before a phase begins, and in dry_run, without importing what is slow to import.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samebit.recipes.config import GrpoRun, SftRun
from samebit.recipes.data.tasks.files import BY_PYARROW, kinds_at
from samebit.recipes.demo_config import DemoRun
from samebit.recipes.eagle3_config import Eagle3Run, TrainingRun
from samebit.recipes.launch.launched import is_on_ray, launcher_of
from samebit.recipes.launch.ray_package import require_own_cluster, require_ray
from samebit.recipes.plan_config import PlanRun
from samebit.recipes.tools_config import FetchRun


class MissingError(ImportError):
    """A run needs something that is not there; the message says what would do."""


def require_ready(run: Any) -> None:
    """Raise ImportError, naming the key, for a package or a login that `run` cannot do without, and
    ValueError for a Ray cluster beside the one that the environment names.

    Commands that need nothing pass.
    """
    for why, package, instead in _packages(run):
        module = package.replace("-", "_")
        if importlib.util.find_spec(module) is None:
            raise MissingError(
                f"{why} needs the package {package}, which is not installed: "
                f"pip install {package}{f', or give {instead}' if instead else ''}"
            )
    for prefix, phase in _phases(run):
        if launcher_of(phase) == "ray":
            require_ray(f"{prefix}placement.launcher=ray")
            if isinstance(phase, GrpoRun) and not is_on_ray():
                address = phase.placement.ray_address
                require_own_cluster(f"{prefix}placement.ray_address", address)
        if phase.logger.wandb == "online":
            _require_wandb_login(prefix)


def _phases(run: Any) -> list[tuple[str, TrainingRun]]:
    if isinstance(run, DemoRun):
        return [(f"{n}.", p) for n, p in (("sft", run.sft), ("grpo", run.grpo)) if p is not None]
    if isinstance(run, PlanRun):  # which reads no data and logs nothing
        return []
    return [("", run)] if isinstance(run, SftRun | GrpoRun | Eagle3Run) else []


def _packages(run: Any) -> Iterator[tuple[str, str, str]]:
    """Why a package is needed, its name, and what would do without."""
    if isinstance(run, FetchRun) or (isinstance(run, DemoRun) and run.model == "smollm2"):
        instead = "device=cpu for the tiny model" if isinstance(run, DemoRun) else ""
        yield "reading the GGUF file of SmolLM2", "gguf", instead
        yield "reading the GGUF file of SmolLM2", "accelerate", instead
    for prefix, phase in _phases(run):
        data, wandb = phase.data, phase.logger.wandb
        if wandb != "disabled":
            why = f"{prefix}logger.wandb, which is {wandb!r},"
            yield why, "wandb", f"{prefix}logger.wandb=disabled"
        if phase.logger.tensorboard:
            why = f"{prefix}logger.tensorboard, which is true,"
            yield why, "tensorboard", f"{prefix}logger.tensorboard=false"
        if data.task.startswith("reasoning_gym"):
            yield f"{prefix}data.task, which is {data.task!r},", "reasoning-gym", ""
        paths = [data.path, data.eval_path]
        paths += [path for source in data.sources for path in (source.path, source.eval_path)]
        kinds = sorted({kind for path in paths if path for kind in kinds_at(Path(path))})
        if found := [kind for kind in kinds if kind in BY_PYARROW]:
            yield f"{prefix}data, a {found[0]} file,", "pyarrow", "a .jsonl file"
        if isinstance(phase, GrpoRun):
            yield "report.html, with its curves,", "matplotlib", ""
            for key, name in ((key, f.name) for key, f in phase.reward.functions.items()):
                if name in ("math_verify", "reasoning_gym"):
                    yield f"{prefix}{key}.name, which is {name!r},", name.replace("_", "-"), ""


def _require_wandb_login(prefix: str) -> None:
    """MissingError unless wandb finds a key where it looks for one; asks no server."""
    import wandb

    try:
        from wandb.sdk.lib import wbauth
    except ImportError:  # no public part of wandb: without it, the start of the run's log says it
        return
    ask = {"source": "samebit", "prompt": False, "update_session": False}
    try:
        found = wbauth.authenticate_session(host=wandb.setup().settings.base_url, **ask)
        problem = None if found else "no API key is configured"
    except wandb.Error as error:
        problem = str(error)
    if problem:
        raise MissingError(
            f"{prefix}logger.wandb is 'online' and {problem}: run `wandb login`, set "
            f"WANDB_API_KEY, or give {prefix}logger.wandb=offline"
        )
