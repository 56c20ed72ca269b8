"""What a task gives: problems by index, in two splits that share none, chosen by one config."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from samebit.trainer.config import require_default

OVERLONG = ("error", "drop", "truncate_left")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Holds what the model is asked and what a reward compares its answer with."""

    index: int
    """Position in its dataset."""
    prompt: str | list[dict[str, str]]
    """Plain text, or chat messages with `role` and `content`."""
    label: str
    """The reference answer; empty where the task has a scorer and no single answer."""
    metadata: dict[str, Any]
    """Whatever else the reward needs."""
    where: str = field(default="", compare=False)
    """Where it was read, as in "data.jsonl, line 7"; empty for a generated one."""

    @property
    def name(self) -> str:
        """Errors call it this."""
        return f"{self.where}: problem {self.index}" if self.where else f"problem {self.index}"


@runtime_checkable
class Dataset(Protocol):
    """Gives problems by index: the same one for an index in any process and any order.

    What is there already is a list; a class makes each problem when it is asked for.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


@dataclass(kw_only=True)
class DataConfig:
    """Says where the problems come from."""

    task: str = "file"
    """`file`, `reverse_digits`, `reasoning_gym/<name>`, or your `module:function`."""
    path: str | None = None
    """Task `file`: the training records, .jsonl or .parquet."""
    eval_path: str | None = None
    """Task `file`: the held-out records; unset, the last `eval_size` records of `path`."""
    prompt_key: str = "prompt"
    """Task `file`: key of the prompt (text or chat messages); dots reach into nested fields."""
    label_key: str = "label"
    """Task `file`: key of the reference answer; dots reach into nested fields."""
    chat: bool = False
    """Give text prompts to the model as one user message of its chat template."""
    metadata_keys: list[str] = field(default_factory=list)
    """Task `file`: keys kept as the problem's metadata; dots reach into nested fields."""
    size: int = 100_000
    """Generated tasks: problems in the train split."""
    eval_size: int = 256
    """Problems in the held-out split; with `eval_path`, all of that file's records are used."""
    seed: int = 0
    """Generated tasks: which problems are drawn."""
    args: dict[str, Any] = field(default_factory=dict)
    """Generated tasks: arguments of the generator."""
    overlong_prompts: str = "error"
    """A prompt (sft: with its label) over the limit: `error`; `drop`: its record is left out;
    `truncate_left`: of a chat the oldest turns go, of a plain text its first tokens."""

    def __post_init__(self) -> None:
        if self.overlong_prompts not in OVERLONG:
            raise ValueError(
                f"data.overlong_prompts is {self.overlong_prompts!r}; give one of "
                f"{', '.join(OVERLONG)}"
            )
        if self.task == "file" and self.path is not None:
            require_default(self, "data", ("size", "seed"), "data.path is given")
        if self.task != "file":
            keys = ("prompt_key", "label_key", "metadata_keys")
            require_default(self, "data", keys, f"data.task is {self.task!r}")


def check_index(index: int, size: int) -> None:
    """Raise IndexError unless 0 <= index < size (which also ends a plain `for` loop)."""
    if not 0 <= index < size:
        raise IndexError(f"problem {index} of a split of {size}; give 0 to {size - 1}")
