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


def load_datasets(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return the train split and the held-out split of a task. No prompt is in both.

    Raises ValueError for an unknown task or a bad setting, FileNotFoundError for a missing file.
    """
    name, slash, _ = config.task.partition("/")
    own = ":" in config.task
    load = _load_own(config.task) if own else TASKS.get(name)
    if load is None or bool(slash) != (name == "reasoning_gym"):
        raise ValueError(
            f"data.task is {config.task!r}; give one of file, reverse_digits, "
            "reasoning_gym/<name>, or module:function or module:Class"
        )
    if config.size < 1:
        raise ValueError(f"data.size is {config.size}; give at least 1")
    if config.eval_size < 0:
        raise ValueError(f"data.eval_size is {config.eval_size}; give 0 or more")
    if name != "file" and (config.path or config.eval_path):
        raise ValueError(
            f"data.path is {config.path!r} and data.eval_path is {config.eval_path!r}, but the "
            f"task {config.task!r} generates its problems; leave both unset, or use task 'file'"
        )
    try:
        splits: Any = load(config) if callable(load) else None
    except Exception as error:  # the user's own may raise anything
        if not own or isinstance(error, ValueError | OSError):
            raise
        raise ValueError(f"data.task is {config.task!r}, which failed: {error!r}") from error
    fits = isinstance(splits, tuple) and [isinstance(x, Dataset) for x in splits] == [True, True]
    meaning = "a function: load(config) -> (train, held_out), two datasets, or a class of them: "
    meaning += "Class(config, held_out=False); datasets have __len__ and __getitem__"
    require(fits, "data.task", config.task, meaning)
    train, held_out = splits
    for split, size in ((train, 1), (held_out, min(config.eval_size, 1))):
        if own and len(split) < size:
            kind = "problem to train on" if split is train else "held-out problem"
            raise ValueError(f"data.task is {config.task!r}, which has no {kind}; give at least 1")
    return splits


def _load_own(task: str) -> Any:
    """What gives both splits: a function of the user's, or a class, which is made for each."""
    found = import_named(task, "data.task")
    if not isinstance(found, type):
        return found
    made: Any = found
    return lambda config: (made(config, held_out=False), made(config, held_out=True))
