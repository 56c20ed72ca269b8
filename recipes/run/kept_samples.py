"""The samples that a run has kept: found by words, in any order. No torch here."""

import heapq
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from samebit.recipes.run.dialogue import dialogue, names_of
from samebit.recipes.run.metrics import read_row

Row = dict[str, Any]

PER_PAGE = 20
MOST_SAMPLES = 5000
"""Of a run that a page holds: the first of every order, the others evenly over all."""
MOST_SAMPLE_BYTES = 12 << 20
"""Of a page: it holds fewer samples where they are long."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Holds what samples are ordered by."""

    step: int
    kind: str
    reward: float
    length: int
    """Of the completion, in tokens; in characters where its tokens were not kept."""


ORDERS: dict[str, Callable[[Facts], float]] = {
    "newest first": lambda sample: -sample.step,
    "oldest first": lambda sample: sample.step,
    "highest reward": lambda sample: -sample.reward,
    "lowest reward": lambda sample: sample.reward,
    "longest": lambda sample: -sample.length,
    "shortest": lambda sample: sample.length,
}
"""Of those that are alike the one that was written first comes first."""


@dataclass(frozen=True)
class Query:
    """Says which samples are asked for; raises ValueError for an order that there is not."""

    words: str = ""
    """What a prompt, a completion or a label holds, in letters of any case."""
    kind: str = ""
    """eval or train; empty: both."""
    order: str = "newest first"
    page: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order is {self.order!r}; give one of {', '.join(ORDERS)}")


class KeptSamples:
    """The lines of a samples.jsonl, each checked as it comes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[bytes] = []
        self.facts: list[Facts] = []

    def __len__(self) -> int:
        return len(self._lines)

    def copy(self) -> Self:
        """Return those that there are now."""
        found = type(self)(self._path)
        found._lines, found.facts = self._lines.copy(), self.facts.copy()
        return found

    def take(self, lines: list[bytes]) -> None:
        """Take further lines; none, and ValueError, which names the line, if one is damaged."""
        first = len(self) + 1
        facts = [_facts(line, f"{self._path}, line {first + i}") for i, line in enumerate(lines)]
        self._lines += lines
        self.facts += facts

    def clear(self) -> None:
        """Forget all."""
        self._lines.clear()
        self.facts.clear()

    def shown(self, number: int) -> Row:
        """Return what a page shows of a sample: its row, with a chat as the text that it is."""
        row = read_row(self._lines[number], f"{self._path}, line {number + 1}")
        row["prompt"] = dialogue(row.get("prompt"))
        return row | ({"tools": names_of(row["tools"])} if "tools" in row else {})

    def find(self, query: Query) -> list[int]:
        """Return the numbers of the samples that a query asks for, as they were written."""
        words, plain = query.words.lower(), _plain_part(query.words.lower())
        return [
            number
            for number, facts in enumerate(self.facts)
            if not query.kind or facts.kind == query.kind
            if not words or (_may_have(self._lines[number], plain) and self._has(number, words))
        ]

    def chosen(self, most_bytes: int) -> list[int]:
        """Return the numbers of those that a page of so many bytes holds, at least two if there
        are: the first of every order, and the others evenly over all."""
        kept = self._first_ones(most_bytes // 2)
        most = MOST_SAMPLES - len(kept)
        while True:
            found = sorted(kept.union(evenly(range(len(self)), most)))
            size = sum(len(self._lines[number]) for number in found)
            if size <= most_bytes or most == 2:
                return found
            most = max(2, min(most - 1, most * most_bytes // size))

    def _first_ones(self, most_bytes: int) -> set[int]:
        """The first of every order, as many of each as there is room for."""
        kept, firsts = set[int](), list[list[int]]()
        for rank in ORDERS.values():
            ranks = [rank(facts) for facts in self.facts]
            firsts.append(heapq.nsmallest(PER_PAGE, range(len(self)), key=ranks.__getitem__))
        for numbers in zip(*firsts, strict=True):
            for number in numbers:
                size = 0 if number in kept else len(self._lines[number])
                if size > most_bytes:
                    return kept
                most_bytes -= size
                kept.add(number)
        return kept

    def _has(self, number: int, words: str) -> bool:
        row = self.shown(number)
        texts = (row["prompt"], row["completion"], row.get("label"))
        return words in "\n".join(str(text) for text in texts if text is not None).lower()


def found_in(runs: Sequence[tuple[int, KeptSamples]], query: Query) -> Row:
    """Return a page of the samples of runs, each with the number of its run, as JSON values."""
    places = [(i, number) for i, kept in runs for number in kept.find(query)]
    of, rank = dict(runs), ORDERS[query.order]
    places.sort(key=lambda place: rank(of[place[0]].facts[place[1]]))
    pages = max(1, math.ceil(len(places) / PER_PAGE))
    page = min(max(query.page, 0), pages - 1)
    here = places[page * PER_PAGE : (page + 1) * PER_PAGE]
    return {
        "num_found": len(places),
        "page": page,
        "pages": pages,
        "samples": [{"i": i, "sample": of[i].shown(number)} for i, number in here],
    }


def evenly[T](items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` of the items, in order, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def _plain_part(words: str) -> bytes:
    """The longest part of such letters as JSON writes as they are."""
    return max(re.findall("[a-z0-9]+", words), key=len, default="").encode()


def _may_have(line: bytes, plain: bytes) -> bool:
    """Whether a row may hold words, by their plain part: most lines need not be read."""
    return plain in line.lower() or b"\\u" in line


def _facts(line: bytes, name: str) -> Facts:
    """What a sample is ordered by. Raises ValueError, which names the key, for what no logger
    writes."""
    row = read_row(line, name)
    for key, (fits, meaning) in _KEYS.items():
        if not fits(row.get(key)):
            raise ValueError(f"{name} is damaged: its {key!r} is not {meaning}")
    length = len(row["completion"])
    if (tokens := row.get("tokens")) is not None:
        length = len(tokens)
        for key, what in {"logprobs": "log-prob", "loss_mask": "mask"}.items():
            values = row.get(key, None if key == "logprobs" else tokens)
            if not isinstance(values, list) or len(values) != length:
                raise ValueError(f"{name} is damaged: it has other than one {what} of each token")
        numbers = row["logprobs"]
        if not {*map(type, numbers)} <= {int, float} or not _is_finite(sum(numbers)):
            raise ValueError(f"{name} is damaged: a log-prob of it is no finite number")
    return Facts(row["step"], row["kind"], row["reward"], length)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and {*map(type, values)} <= {kind}


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda x: isinstance(x, str), "a text"),
    "reward": (_is_finite, "a finite number"),
    "completion": (lambda x: isinstance(x, str), "a text"),
    "tokens": (lambda x: x is None or _are(str, x), "a list of texts"),
    "tools": (lambda x: x is None or _are(dict, x), "a list of objects"),
    "rewards": (lambda x: x is None or isinstance(x, dict), "an object"),
}
