"""Which files a training run reads, by the keys of the configuration that name them."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from samebit.recipes.config import GrpoRun
from samebit.recipes.data.tasks.files import fitting
from samebit.recipes.eagle3_config import Eagle3Run, TrainingRun
from samebit.recipes.models.side_files import CHAT_TEMPLATES

OWN_KEYS = ("model_family", "numerics.attention", "data.task", "reward.name",
            "algorithm.name", "rollout.generate")  # fmt: skip
"""Keys that may name something of the user's own, as module:attribute."""


def source_of(name: str) -> Path | None:
    """Return the file of what is named as module:attribute."""
    module = name.partition(":")[0] if ":" in name else ""
    try:
        spec = importlib.util.find_spec(module) if module else None
    except (ImportError, ValueError, AttributeError):
        return None  # loading it says why
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def own_sources(run: TrainingRun) -> dict[str, Path | None]:
    """Return for each of OWN_KEYS, and each term of the reward, the file of what it names.

    None stands for what is not the user's own.
    """
    found = {}
    for key in OWN_KEYS:
        section, _, name = key.rpartition(".")
        value = getattr(getattr(run, section, None) if section else run, name, None)
        found[key] = source_of(str(value))
    if isinstance(run, GrpoRun):
        terms = enumerate(run.reward.terms)
        found |= {f"reward.terms.{i}.name": source_of(term.name) for i, term in terms}
    return found


def other_models(run: TrainingRun) -> dict[str, Path]:
    """Return the folders of a critic and a teacher, by the keys that name them."""
    found = {}
    if isinstance(run, GrpoRun) and run.critic is not None and run.critic.model is not None:
        found["critic.model"] = Path(run.critic.model)
    if isinstance(run, GrpoRun) and run.distillation is not None:
        found["distillation.teacher"] = Path(run.distillation.teacher)
    return found


def input_files(run: TrainingRun) -> Iterator[tuple[str, Path]]:
    """Yield (key, file) of everything: model, data, modules of the user's, files in arguments."""
    model = Path(run.model.path)
    if model.is_dir():
        inside = [*model.iterdir(), *(model / CHAT_TEMPLATES).glob("*")]
        visible = (file for file in inside if file.is_file() and not file.name.startswith("."))
        yield from (("model.path", file) for file in visible)
    key, draft = "engine.draft_model", None
    if isinstance(run, Eagle3Run):
        key, draft = "draft.path", run.draft.path
    elif isinstance(run, GrpoRun):
        draft = run.engine.draft_model
    if draft is not None:
        yield from ((key, file) for file in Path(draft).glob("*") if file.is_file())
    for key, folder in other_models(run).items():
        yield from ((key, file) for file in folder.glob("*") if file.is_file())
    for key in ("path", "eval_path"):
        if file := getattr(run.data, key):
            yield from _with_content(f"data.{key}", Path(file))
        for i, source in enumerate(run.data.sources):
            if file := getattr(source, key):
                yield from _with_content(f"data.sources.{i}.{key}", Path(file))
    if run.data.filter is not None and (module := source_of(run.data.filter)):
        yield "data.filter", module  # not bound: the contents that it leaves are
    yield from _files_in(run.data.args, "data.args")
    yield from ((key, source) for key, source in own_sources(run).items() if source)
    if isinstance(run, GrpoRun):
        for key, function in run.reward.functions.items():
            yield from _files_in(function.args, f"{key}.args")
        yield from _files_in(run.rollout.generate_args, "rollout.generate_args")


def _with_content(key: str, path: Path) -> Iterator[tuple[str, Path]]:
    """A file, or a folder or a pattern and what it means."""
    yield key, path
    yield from ((key, file) for file in fitting(path))


def _files_in(arguments: Mapping[str, Any], key: str) -> Iterator[tuple[str, Path]]:
    """Texts that are paths of files."""
    for name, value in flatten(arguments, key).items():
        with suppress(OSError, ValueError):  # too long for a path, or with a NUL: some other text
            if isinstance(value, str) and Path(value).is_file():
                yield name, Path(value)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by dotted names."""
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, list | tuple):
        items = iter(enumerate(value))
    else:
        return {name: value}
    below = (flatten(x, f"{name}.{key}" if name else key) for key, x in items)
    return {k: v for leaves in below for k, v in leaves.items()}
