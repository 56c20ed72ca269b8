"""What a task gives: problems by index, in two splits that share none, chosen by one config."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, runtime_checkable

from samebit.trainer.config import require, require_default

OVERLONG = ("error", "drop", "truncate_left")

ChatPrompt = list[dict[str, Any]]
"""Chat messages with texts `role` and `content`; an assistant's may have `tool_calls`."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Holds what the model is asked and what a reward compares its answer with."""

    index: int
    """Position in its dataset."""
    prompt: str | ChatPrompt
    label: str
    """The reference answer; empty where the task has a scorer and no single answer."""
    metadata: dict[str, Any]
    """Whatever else the reward needs."""
    rejected: str = ""
    """Of dpo: the answer that is worse than `label`."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """What may be called, as the chat template is told it."""
    where: str = field(default="", compare=False)
    """Where it was read, as in "data.jsonl, line 7"; empty for a generated one."""

    @property
    def is_answered(self) -> bool:
        """Whether it is a chat with its answers in it, and no label: sft trains on them all."""
        return not self.label and ends_with_answer(self.prompt)

    @property
    def name(self) -> str:
        """Errors call it this."""
        return f"{self.where}: problem {self.index}" if self.where else f"problem {self.index}"


def ends_with_answer(prompt: str | ChatPrompt) -> bool:
    """Whether a prompt is chat messages of which the last is the assistant's."""
    return isinstance(prompt, list) and bool(prompt) and prompt[-1]["role"] == "assistant"


@runtime_checkable
class Dataset(Protocol):
    """Gives problems by index: the same one for an index in any process and any order.

    What is there already is a list; a class makes each problem when it is asked for.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


class MixedRecords(list[Problem]):
    """Holds the records of several sources, one source behind another."""

    def __init__(
        self, parts: Sequence[Sequence[Problem]], weights: Sequence[float], names: Sequence[str]
    ) -> None:
        """parts: each source's records; names: what errors call the sources."""
        super().__init__(problem for part in parts for problem in part)
        self.sizes = tuple(len(part) for part in parts)
        self.weights = tuple(weights)
        self.names = tuple(names)


@dataclass(kw_only=True)
class DataSource:
    """Says where some of the problems come from; what is unset is as in `data`."""

    path: str = "???"
    """As data.path."""
    weight: float = 1.0
    """This share of the training order, over the sum of all weights, is its records."""
    prompt_key: str | None = None
    label_key: str | None = None
    tools_key: str | None = None
    metadata_keys: list[str] | None = None
    eval_path: str | None = None
    """Its held-out records; unset, the last `eval_size` records of `path`."""
    eval_size: int | None = None


@dataclass(kw_only=True)
class DataConfig:
    """Says where the problems come from."""

    task: str = "file"
    """`file`, `reverse_digits`, `reasoning_gym/<name>`, or your `module:function` or
    `module:Class`."""
    path: str | None = None
    """Task `file`: the training records: a .jsonl, .parquet or .arrow file, a folder of them, a
    pattern such as FOLDER/train-*, or a Hugging Face data set saved on disk."""
    sources: list[DataSource] = field(default_factory=list)
    """Task `file`, in place of `path`: several such, mixed: [{path: a, weight: 2}, {path: b}]."""
    eval_path: str | None = None
    """Task `file`: the held-out records; unset, the last `eval_size` records of `path`, or of each
    source."""
    prompt_key: str = "prompt"
    """Task `file`: key of the prompt (text or chat messages); dots reach into nested fields."""
    label_key: str | None = "label"
    """Task `file`: key of the reference answer; dots reach into nested fields. A list or an object
    there is its JSON text; null: there is none."""
    tools_key: str | None = None
    """Task `file`: key of the tools that the chat template is told: a list, its JSON text, or
    null."""
    chat: bool = False
    """Give text prompts to the model as one user message of its chat template."""
    few_shot: int = 0
    """Tasks `reasoning_gym/<name>`: so many questions with answers before each one, as turns of the
    chat, the same for all of a task; with chat=true."""
    metadata_keys: list[str] = field(default_factory=list)
    """Task `file`: keys kept as the problem's metadata; dots reach into nested fields."""
    filter: str | None = None
    """Task `file`: your `module:function` of a Problem; records are used of which it returns True,
    to train on and held out."""
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
        named = self.filter is None or ":" in self.filter
        require(named, "data.filter", self.filter, "module:function, or unset")
        if self.task == "file" and (self.path is not None or self.sources):
            given = "data.path" if self.path is not None else "data.sources"
            require_default(self, "data", ("size", "seed"), f"{given} is given")
        if self.task != "file":
            keys = ("prompt_key", "label_key", "tools_key", "metadata_keys", "filter", "sources")
            require_default(self, "data", keys, f"data.task is {self.task!r}")
        if self.sources:
            require_default(self, "data", ("path",), "data.sources is given")
        if not self.task.startswith("reasoning_gym/"):
            require_default(self, "data", ("few_shot",), f"data.task is {self.task!r}")
        require(0 <= self.few_shot <= 64, "data.few_shot", self.few_shot, "0 to 64")
        if not self.chat:
            require_default(self, "data", ("few_shot",), "data.chat is false")
        for i, source in enumerate(self.sources):
            self._check_source(source, f"data.sources.{i}")
            for j, other in enumerate(self.sources[:i]):
                if replace(other, weight=source.weight) == source:
                    weight = other.weight + source.weight
                    what = f"data.sources.{j} again; give one of weight {weight:g}"
                    raise ValueError(f"data.sources.{i} is {what}")

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out problems."""
        if self.eval_path is not None or not self.sources:
            return self.eval_path is not None or self.eval_size >= 1
        sizes = [self.eval_size if s.eval_size is None else s.eval_size for s in self.sources]
        paths = [source.eval_path for source in self.sources]
        return any(size >= 1 or path is not None for size, path in zip(sizes, paths, strict=True))

    def of_prompts(self) -> Self:
        """Return the same where only prompts are read: records need no label."""
        return replace(self, label_key=None) if self.task == "file" else self

    def _check_source(self, source: DataSource, key: str) -> None:
        require(source.path not in ("", "???"), f"{key}.path", source.path, "a path")
        fits = isinstance(source.weight, int | float) and 1e-9 <= source.weight <= 1e9
        require(fits, f"{key}.weight", source.weight, "positive, 1e-9 to 1e9")
        fits = source.eval_size is None or source.eval_size >= 0
        require(fits, f"{key}.eval_size", source.eval_size, "0 or more, or null")
        if self.eval_path is not None:
            require_default(source, key, ("eval_path", "eval_size"), "data.eval_path is given")
        if source.eval_path is not None:
            require_default(source, key, ("eval_size",), f"{key}.eval_path is given")


@dataclass(kw_only=True)
class SupervisedConfig(DataConfig):
    """Says where records come from whose answers are trained on."""

    label_key: str | None = "label"
    """Task `file`: key of the answer; dots reach into nested fields. A record without one, whose
    prompt is chat messages that end with the assistant's, is trained on all the assistant's."""


@dataclass(kw_only=True)
class PreferenceConfig(SupervisedConfig):
    """Says where pairs of answers come from. Each answer is a text, a chat message of the
    assistant's, or the prompt's messages with such a one behind; of these the prompt may be left
    out."""

    label_key: str | None = "chosen"
    """Task `file`: key of the better answer; dots reach into nested fields."""
    rejected_key: str = "rejected"
    """Task `file`: key of the worse answer; dots reach into nested fields."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.label_key is not None, "data.label_key", self.label_key, "a key: dpo needs two"
        )
        if self.task != "file":
            require_default(self, "data", ("rejected_key",), f"data.task is {self.task!r}")


def check_index(index: int, size: int) -> None:
    """Raise IndexError unless 0 <= index < size (which also ends a plain `for` loop)."""
    if not 0 <= index < size:
        raise IndexError(f"problem {index} of a split of {size}; give 0 to {size - 1}")
