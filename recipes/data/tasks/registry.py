"""Every task by its name, and the problems of the one that a configuration names."""

from collections.abc import Callable
from typing import Any

from samebit.kernels.named import import_named
from samebit.recipes.data.tasks import file, reasoning_gym, reverse_digits
from samebit.recipes.data.tasks.base import DataConfig, Dataset
from samebit.trainer.config import require

# A new task is one new module with `load(config) -> (train, eval)` and one line here. A task's
# name may carry a variant after a slash ("reasoning_gym/chain_sum"), which its module reads.
TASKS: dict[str, Callable[[DataConfig], tuple[Dataset, Dataset]]] = {
    "file": file.load,
    "reasoning_gym": reasoning_gym.load,
    "reverse_digits": reverse_digits.load,
}


MOST_PROBLEMS = 1 << 30
"""The order of an epoch is drawn whole, and takes 8 bytes a problem."""


def load_datasets(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return the train split and the held-out split of a task. No prompt is in both.

    Raises ValueError for an unknown task or a bad setting, FileNotFoundError for a missing file.
    """
    name, slash, _ = config.task.partition("/")
    load = _load_own if ":" in config.task else TASKS.get(name)
    if load is None or bool(slash) != (name == "reasoning_gym"):
        raise ValueError(
            f"data.task is {config.task!r}; give one of file, reverse_digits, "
            "reasoning_gym/<name>, or module:function or module:Class"
        )
    if not 1 <= config.size <= MOST_PROBLEMS:
        meaning = f"give at least 1 and at most {MOST_PROBLEMS}"
        raise ValueError(f"data.size is {config.size}; {meaning}")
    if config.eval_size < 0:
        raise ValueError(f"data.eval_size is {config.eval_size}; give 0 or more")
    if name != "file" and (config.path or config.eval_path):
        raise ValueError(
            f"data.path is {config.path!r} and data.eval_path is {config.eval_path!r}, but the "
            f"task {config.task!r} generates its problems; leave both unset, or use task 'file'"
        )
    return load(config)


def _load_own(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Both splits of a user's function, or of a class, which is made for each."""
    found: Any = import_named(config.task, "data.task")
    where, sizes = f"data.task is {config.task!r}, which", list[int]()
    try:
        if isinstance(found, type):
            splits: Any = found(config, held_out=False), found(config, held_out=True)
        else:
            splits = found(config) if callable(found) else None
        pair = isinstance(splits, tuple) and [isinstance(x, Dataset) for x in splits]
        if pair == [True, True]:
            sizes = [len(split) for split in splits]
    except (Exception, SystemExit) as error:  # the user's own may raise anything
        raise ValueError(f"{where} failed: {error!r}") from error
    meaning = "a function: load(config) -> (train, held_out), two datasets, or a class of them: "
    meaning += "Class(config, held_out=False); datasets have __len__ and __getitem__"
    require(bool(sizes), "data.task", config.task, meaning)
    kinds = ("problem to train on", "held-out problem")
    for size, least, kind in zip(sizes, (1, min(config.eval_size, 1)), kinds, strict=True):
        if size < least:
            raise ValueError(f"{where} has no {kind}; give at least 1")
        if size > MOST_PROBLEMS:
            raise ValueError(
                f"{where} has {size} problems in a split; give at most {MOST_PROBLEMS}"
            )
    return splits
