"""Every record of a run, before its first step: its prompt and label as token ids, all checked.

What is wrong is said of all records at once. Token ids are kept, so nothing is encoded twice; a
problem whose turn comes unforeseen is encoded then.
"""

import logging
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from tqdm import tqdm

from samebit.recipes.data.answered_chats import encode_answered
from samebit.recipes.data.order import mixed_index, problem_index
from samebit.recipes.data.tasks.base import (
    ChatPrompt,
    Dataset,
    MixedRecords,
    Problem,
    check_index,
)
from samebit.recipes.data.tasks.chat import check_problem
from samebit.recipes.data.text import TextCodec
from samebit.recipes.launch.launched import launched_rank
from samebit.rollout.values import shown

logger = logging.getLogger(__name__)

CHUNK = 2000  # records that are encoded together

Check = Callable[[Sequence[Problem]], list[str]]
"""For each problem what is wrong with it, or an empty text."""


@dataclass(frozen=True)
class Encoded:
    """Holds a record as token ids."""

    prompt_ids: array[int]
    label_ids: array[int]
    """Empty but for sft and dpo. Of a chat with its answers: all from the first answer on."""
    label_mask: array[int] = field(default_factory=lambda: array("b"))
    """Of a chat with its answers: whether each of label_ids is one's."""
    rejected_ids: array[int] = field(default_factory=lambda: array("i"))
    """Of dpo."""
    was_cut: bool = False


@dataclass(frozen=True)
class Unfit:
    """Says what is wrong with a record."""

    fault: str
    is_overlong: bool = False


@dataclass(frozen=True)
class Encoder:
    """Makes token ids of problems that fit."""

    text: TextCodec
    vocab_size: int
    """The model's."""
    max_len: int
    """Most tokens of a prompt, or of prompt and label."""
    limit: str
    """What `max_len` is, for errors: "rollout.max_prompt_len"."""
    policy: str
    """data.overlong_prompts."""
    with_labels: bool = False
    """Labels are trained on."""
    pair_len: int | None = None
    """Most tokens of a prompt with its label and again with the rejected answer, which are both
    trained on then: trainer.micro_batch_tokens."""

    def __call__(self, problems: Sequence[Problem]) -> list[Encoded | Unfit]:
        found: dict[int, Encoded | Unfit] = {}
        texts: dict[int, str] = {}
        for i, problem in enumerate(problems):
            try:
                check_problem(problem)
                if self._trains_on(problem):
                    found[i] = self._fit_chat(problem)
                else:
                    texts[i] = self.text.render(problem.prompt, problem.tools)
            except ValueError as error:
                found[i] = Unfit(str(error))
        good = list(texts)
        prompts = self.text.encode_prompts(
            [problems[i].prompt for i in good], [texts[i] for i in good]
        )
        labels, rejected = ([list[int]() for _ in good] for _ in range(2))
        if self.with_labels:
            labels = self.text.encode_labels([problems[i].label for i in good])
        if self.pair_len is not None:
            rejected = self.text.encode_labels([problems[i].rejected for i in good])
        for i, prompt, *answers in zip(good, prompts, labels, rejected, strict=True):
            try:
                found[i] = self._fit(problems[i], prompt, *answers)
            except ValueError as error:  # the template refuses what is left of a chat
                found[i] = Unfit(str(error))
        return [found[i] for i in range(len(problems))]

    def _fit(
        self, problem: Problem, prompt: list[int], label: list[int], rejected: list[int]
    ) -> Encoded | Unfit:
        if self.pair_len is not None and not (label and rejected):
            return Unfit("one of its answers is empty; dpo needs two")
        if self.with_labels and not label:
            return Unfit("its label is empty; sft needs an answer")
        if not prompt:
            return Unfit("its prompt has 0 tokens; give one of at least 1")
        rest, was_cut = self.max_len - max(len(label), len(rejected)), False
        if self.pair_len is not None:
            rest = min(rest, (self.pair_len - len(label) - len(rejected)) // 2)
        if self.policy == "truncate_left" and len(prompt) > rest:
            prompt, was_cut = self._cut(problem, prompt, rest), True
        if len(prompt) > rest:
            lens = len(prompt), len(label), len(rejected)
            return Unfit(self._too_long(*lens, was_cut), is_overlong=True)
        if fault := self._unknown((*prompt, *label, *rejected)):
            return Unfit(fault)
        return Encoded(
            prompt_ids=array("i", prompt),
            label_ids=array("i", label),
            rejected_ids=array("i", rejected),
            was_cut=was_cut,
        )

    def _trains_on(self, problem: Problem) -> bool:
        """Whether a problem is a chat whose answers are trained on."""
        return self.with_labels and self.pair_len is None and problem.is_answered

    def _fit_chat(self, problem: Problem) -> Encoded | Unfit:
        """A chat with its answers; raises ValueError where they cannot be told from the rest."""
        messages, tools, was_cut = problem.prompt, problem.tools, False
        assert isinstance(messages, list)
        ids, mask = encode_answered(self.text, messages, tools)
        if self.policy == "truncate_left" and len(ids) > self.max_len:

            def size(kept: ChatPrompt) -> int:
                return len(encode_answered(self.text, kept, tools)[0])

            kept, was_cut = _newest_turns(messages, size, self.max_len), True
            ids, mask = encode_answered(self.text, kept, tools)
        if len(ids) > self.max_len:
            least = "at least " if was_cut else ""
            other = " (or give data.overlong_prompts)" if self.policy == "error" else ""
            allowed = f"{self.limit} allows 1 to {self.max_len}{other}"
            return Unfit(f"its chat has {least}{len(ids)} tokens; {allowed}", is_overlong=True)
        if fault := self._unknown(ids):
            return Unfit(fault)
        first = mask.index(True)
        return Encoded(
            prompt_ids=array("i", ids[:first]),
            label_ids=array("i", ids[first:]),
            label_mask=array("b", mask[first:]),
            was_cut=was_cut,
        )

    def _unknown(self, ids: Sequence[int]) -> str:
        """What is wrong with tokens that the model does not know; empty if it knows them."""
        if (highest := max(ids)) < self.vocab_size:
            return ""
        return (
            f"its token {highest} ({self.text.token(highest)!r}) is outside the model's "
            f"vocab_size of {self.vocab_size}: tokenizer and config.json do not fit together"
        )

    def _too_long(self, prompt: int, label: int, rejected: int, was_cut: bool) -> str:
        least = "at least " if was_cut else ""
        tokens = f"its prompt has {least}{prompt} tokens"
        if self.with_labels:
            tokens += f" and its label {label}"
        other = " (or give data.overlong_prompts)" if self.policy == "error" else ""
        if self.pair_len is not None:
            tokens += f" and its rejected answer {rejected}"
            other = (
                f", trainer.micro_batch_tokens {self.pair_len} of prompt and answer twice{other}"
            )
        return f"{tokens}; {self.limit} allows 1 to {self.max_len}{other}"

    def _cut(self, problem: Problem, ids: list[int], max_len: int) -> list[int]:
        """The end of a prompt: of a plain text its last tokens, of a chat its last turns."""
        messages = self.text.messages(problem.prompt)
        if isinstance(messages, str):
            return self.text.cut_left(ids, max_len)

        def encode(kept: ChatPrompt) -> list[int]:
            return self.text.encode_prompts([kept], [self.text.render(kept, problem.tools)])[0]

        return encode(_newest_turns(messages, lambda kept: len(encode(kept)), max_len))


_SYSTEM = ("system", "developer")


def _newest_turns(
    messages: ChatPrompt, size: Callable[[ChatPrompt], int], max_len: int
) -> ChatPrompt:
    """A chat without its oldest turns, so many that it has at most max_len tokens.

    It keeps its system message and its last user turn, and no message is cut.
    """
    head = next((i for i, m in enumerate(messages) if m["role"] not in _SYSTEM), len(messages))
    starts = [i for i, m in enumerate(messages) if m["role"] == "user" and i > head]

    def kept(start: int) -> ChatPrompt:
        return [*messages[:head], *messages[start:]]

    first = bisect_left(starts, True, key=lambda start: size(kept(start)) <= max_len)
    return kept(starts[min(first, len(starts) - 1)]) if starts else messages


class Split:
    """Holds a split of a task with its token ids."""

    def __init__(self, name: str, dataset: Dataset, encoder: Encoder) -> None:
        self.num_dropped = 0
        self.num_cut = 0
        self._name = name
        self.dataset = dataset
        self._sources = dataset if isinstance(dataset, MixedRecords) else None
        self.sizes = () if self._sources is None else self._sources.sizes
        """Numbers of records of each source, where there are several."""
        self._encoder = encoder
        self._kept: Sequence[int] = range(len(dataset))
        self._encoded: dict[int, Encoded] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Problem:
        check_index(index, len(self))
        problem = self._problem(self._kept[index])
        return problem if problem.index == index else replace(problem, index=index)

    def index_at(self, position: int, seed: int) -> int:
        """Return the index of the problem at a place of the endless training order."""
        if self._sources is None:
            return problem_index(position, len(self), seed)
        source, record = mixed_index(position, self.sizes, self._sources.weights, seed)
        return sum(self.sizes[:source]) + record

    def contents(self, name: str) -> dict[str, Dataset]:
        """Return the split under its name; of several sources each one's records by theirs."""
        if self._sources is None:
            return {name: self}
        ends = accumulate(self.sizes)
        parts = zip(self._sources.names, self.sizes, ends, strict=True)
        return {
            f"{name} of {source}": [self[i] for i in range(end - size, end)]
            for source, size, end in parts
        }

    def encoded(self, problem: Problem) -> Encoded:
        """Return a problem as token ids; raises ValueError, naming it, if it does not fit."""
        if (found := self._encoded.get(problem.index)) is None:
            new = self._encoder([problem])[0]
            if isinstance(new, Unfit):
                raise ValueError(f"{problem.name}: {new.fault}")
            found = self._encoded[problem.index] = new
        return found

    def prepare(self, indices: Sequence[int], check: Check, faults: list[str]) -> None:
        """Encode and check the problems at `indices`; what is wrong goes to `faults`.

        Overlong records that are to be dropped are looked for in the whole split, so that what is
        left is the same however long the run is. A bar appears if it takes long.
        """
        drop = self._encoder.policy == "drop"
        order = range(len(self.dataset)) if drop else indices
        kept: list[int] = []
        look = {"unit": "rec", "delay": 1, "leave": False, "disable": launched_rank() > 0}
        with tqdm(desc=self._name, total=len(order), **look) as bar:
            for start in range(0, len(order), CHUNK):
                problems = [self._problem(i) for i in order[start : start + CHUNK]]
                found = self._encoder(problems)
                fit = [p for p, e in zip(problems, found, strict=True) if isinstance(e, Encoded)]
                self._encoder.text.keep_tokens_of(p.label for p in fit)
                wrong = iter(check(fit))
                for problem, encoded in zip(problems, found, strict=True):
                    if isinstance(encoded, Unfit):
                        if not (drop and encoded.is_overlong):
                            faults.append(f"{problem.name}: {encoded.fault}")
                    elif fault := next(wrong):
                        faults.append(f"{problem.name}: {fault}")
                    else:
                        self._encoded[len(kept) if drop else problem.index] = encoded
                        self.num_cut += encoded.was_cut
                        kept.append(problem.index)
                bar.update(len(problems))
        if faults:
            return
        if drop:
            self._kept, self.num_dropped = kept, len(order) - len(kept)
            self._count_kept(kept)
        self._say(self.num_dropped, len(order), "dropped")
        self._say(self.num_cut, len(order), "cut at their left")
        if len(order) and not kept:
            raise ValueError(f"no record of the {self._name} is left: all are overlong")

    def _count_kept(self, kept: Sequence[int]) -> None:
        """The sizes of sources without what was dropped; ValueError where nothing is left."""
        if self._sources is None:
            return
        below = [bisect_left(kept, end) for end in accumulate(self._sources.sizes, initial=0)]
        self.sizes = tuple(b - a for a, b in zip(below, below[1:], strict=False))
        names = zip(self._sources.names, self._sources.sizes, self.sizes, strict=True)
        if empty := [name for name, size, left in names if size and not left]:
            raise ValueError(
                f"no record of {empty[0]} is left in the {self._name}: all are overlong"
            )

    def _problem(self, index: int) -> Problem:
        try:
            problem = self.dataset[index]
        except (Exception, SystemExit) as error:  # a user's own may raise anything
            said = isinstance(error, ValueError | OSError)
            what = f"at {index}: {error}" if said else f"raised {shown(error)} at {index}"
            raise ValueError(f"the {self._name} {what}") from error
        if not isinstance(problem, Problem) or problem.index != index:
            what = f"give a Problem with index {index}"
            raise ValueError(f"the {self._name} holds {shown(problem)} at {index}; {what}")
        return problem

    def _say(self, number: int, total: int, what: str) -> None:
        if number:
            logger.warning(
                "%s: %d of %d records are overlong (%s allows %d tokens): %s",
                *(self._name, number, total, self._encoder.limit, self._encoder.max_len, what),
            )
