"""Tasks `reasoning_gym/<name>`: the procedural tasks of the reasoning_gym package.

The package makes item i from the number seed + i. Train and held-out items take their numbers from
disjoint ranges. Different numbers can still give the same question, so the held-out questions are
generated first, and a train item that repeats one is drawn again from a further range. Worked
examples (data.few_shot) come from a range behind those, and are in no split either.
"""

import difflib
import functools
import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from samebit.recipes.data.tasks.base import (
    ChatPrompt,
    DataConfig,
    Dataset,
    Problem,
    check_index,
)

# Items that one range of seeds can give, and how many ranges a train item may be drawn from.
# Both together with the start stay below 2**32, the largest seed numpy takes.
SEED_RANGE = 2**24
ATTEMPTS = 16

# These iterate over sets of text, so their items change with Python's hash seed (found by
# comparing the items of every task between processes, reasoning_gym 0.1.25).
HASH_DEPENDENT = {
    "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder",
}  # fmt: skip


class Train:
    """Generates the train split on access, never repeating a held-out question or an example's."""

    def __init__(
        self, name: str, config: DataConfig, taken: set[str], examples: dict[str, ChatPrompt]
    ) -> None:
        self._name = name
        self._config = config
        self._taken = taken
        self._examples = examples
        self._source = functools.cache(self._make_source)
        self._source(1)  # bad arguments fail now, not in the middle of a run

    def __len__(self) -> int:
        return self._config.size

    def __getitem__(self, index: int) -> Problem:
        check_index(index, len(self))
        for attempt in range(1, ATTEMPTS + 1):
            entry = _generate(self._source(attempt), index)
            if entry["question"] not in self._taken:
                return _problem(self._name, self._config.args, index, entry, self._examples)
        raise ValueError(
            f"data.task reasoning_gym/{self._name}: {ATTEMPTS} draws for train problem {index} are "
            f"all held-out ones, or worked examples; give a smaller data.eval_size than "
            f"{self._config.eval_size}, a smaller data.few_shot than {self._config.few_shot}, or "
            "data.args that make more different problems"
        )

    def _make_source(self, attempt: int) -> Any:
        seed = _first_seed(self._config.seed) + attempt * SEED_RANGE
        return make_source(self._name, self._config.args, seed=seed, size=self._config.size)


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return the train and held-out split of the task after the slash.

    Raises ValueError for an unknown task (listing close matches), bad arguments, or a task whose
    items change with Python's hash seed unless PYTHONHASHSEED=0; ImportError without the package.
    """
    name = config.task.partition("/")[2]
    if max(config.size, config.eval_size) > SEED_RANGE:
        raise ValueError(
            f"data.size is {config.size} and data.eval_size is {config.eval_size}; reasoning_gym "
            f"tasks give at most {SEED_RANGE} problems"
        )
    _check_hash_seed(name, config.args)
    entries = []
    if config.eval_size:
        seed = _first_seed(config.seed)
        source = make_source(name, config.args, seed=seed, size=config.eval_size)
        entries = [_generate(source, i) for i in range(config.eval_size)]
    taken = {entry["question"] for entry in entries}
    examples = _examples(name, config, taken)
    problems = [_problem(name, config.args, i, entry, examples) for i, entry in enumerate(entries)]
    return Train(name, config, taken, examples), problems


def _examples(name: str, config: DataConfig, taken: set[str]) -> dict[str, ChatPrompt]:
    """Return worked examples as turns, by the task that they are of; their questions are taken."""
    if not config.few_shot:
        return {}
    make_source(name, config.args, seed=0, size=1)  # bad arguments of a composite fail as its own
    parts = {name: config.args}
    if name == "composite":
        own = ("seed", "size")  # of the part's items, which examples are not
        parts = {
            part["name"]: {k: v for k, v in part.get("config", {}).items() if k not in own}
            for part in config.args["datasets"]
        }
    first, found = _first_seed(config.seed) + (ATTEMPTS + 1) * SEED_RANGE, {}
    for part, args in parts.items():
        turns: ChatPrompt = []
        source = make_source(part, args, seed=first, size=16 * config.few_shot)
        for entry in map(functools.partial(_generate, source), range(len(source))):
            if entry["answer"] is None or entry["question"] in taken:
                continue
            taken.add(entry["question"])
            turns.append({"role": "user", "content": entry["question"]})
            turns.append({"role": "assistant", "content": str(entry["answer"])})
            if len(turns) == 2 * config.few_shot:
                break
        else:
            raise ValueError(
                f"data.few_shot is {config.few_shot}; reasoning_gym/{part} has only "
                f"{len(turns) // 2} questions with an answer that are not held out, of "
                f"{len(source)}"
            )
        found[part] = turns
    return found


def make_source(name: str, args: dict[str, Any], *, seed: int, size: int) -> Any:
    """Make the package's dataset `name`; raises ValueError for an unknown name or bad arguments."""
    datasets = _factory().DATASETS
    if name not in datasets:
        close = difflib.get_close_matches(name, datasets, n=5, cutoff=0.4) or sorted(datasets)
        raise ValueError(
            f"data.task names the reasoning_gym task {name!r}, which does not exist; "
            f"close matches: {', '.join(close)}"
        )
    taken = sorted({"seed", "size"} & args.keys())
    if taken:
        raise ValueError(f"data.args has {taken}; set data.seed and data.size instead")
    try:
        settings = _composite_args(args) if name == "composite" else args
        with _isolated_random(seed):
            return _factory().create_dataset(name, **settings, seed=seed, size=size)
    except Exception as error:  # whatever the task's own code makes of a bad argument
        what = error if isinstance(error, AssertionError | TypeError | ValueError) else repr(error)
        raise ValueError(f"data.args {args} of reasoning_gym/{name} is bad: {what}") from error


def _factory() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"the reasoning_gym tasks need a package ({error}): pip install reasoning-gym"
        ) from error
    return reasoning_gym.factory


def _composite_args(args: dict[str, Any]) -> dict[str, Any]:
    from reasoning_gym.composite import DatasetSpec

    return {**args, "datasets": [DatasetSpec(**spec) for spec in args.get("datasets", [])]}


def _check_hash_seed(name: str, args: dict[str, Any]) -> None:
    parts = args.get("datasets", []) if name == "composite" else []
    names = {name, *(part.get("name") for part in parts if isinstance(part, dict))}
    if names & HASH_DEPENDENT and sys.flags.hash_randomization:
        raise ValueError(
            f"data.task is 'reasoning_gym/{name}', whose problems change with Python's hash seed; "
            "start Python with PYTHONHASHSEED=0 in the environment, or choose another task"
        )


def _first_seed(seed: int) -> int:
    # Hashed, so that data.seed 0 and 1 are not the same problems moved by one.
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4]) // 2


def _generate(source: Any, index: int) -> dict[str, Any]:
    try:
        with _isolated_random(source.seed + index):
            return source[index]
    except Exception as error:  # the task's own code
        raise ValueError(
            f"the reasoning_gym task {type(source).__name__} cannot make problem {index}: {error!r}"
        ) from error


@contextmanager
def _isolated_random(seed: int) -> Iterator[None]:
    """Global generators set to a known state, and put back: some tasks draw from or seed them."""
    import numpy as np

    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _problem(
    name: str,
    args: dict[str, Any],
    index: int,
    entry: dict[str, Any],
    examples: dict[str, ChatPrompt],
) -> Problem:
    metadata = {"task": name, "args": args, "entry": entry}
    label = "" if entry["answer"] is None else str(entry["answer"])
    prompt: str | ChatPrompt = entry["question"]
    if examples:
        of = entry["metadata"]["source_dataset"] if name == "composite" else name
        prompt = [*examples[of], {"role": "user", "content": entry["question"]}]
    return Problem(index=index, prompt=prompt, label=label, metadata=metadata)
