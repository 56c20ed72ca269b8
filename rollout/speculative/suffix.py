"""Suffix: what followed the longest suffix of the text when it stood there before.

It looks in the sample's own prompt and completion and in those of its siblings, as far as they are.
There is no model, and the work for a token is bounded, however long the texts are.
Source: Oliaro et al. 2024 (SuffixDecoding), arXiv 2411.04975.

Deviation: a table of places by their last three tokens instead of a suffix tree. Of the newest
places the one with the longest common suffix is taken, the newer of two.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self
from weakref import WeakKeyDictionary, WeakValueDictionary

from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.speculative.proposer import Context, Proposal, Proposer, ProposerParts

_GRAM = 3  # tokens that a place is found by: the shortest match
_PLACES = 8  # newest ones that are compared
_LONGEST = 64  # a longer match is as good


@dataclass(eq=False)
class _Group:
    """The texts of a prompt's samples, and where each run of _GRAM tokens ended in them."""

    texts: list[list[int]] = field(default_factory=list)
    places: defaultdict[tuple[int, ...], deque[tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(partial(deque, maxlen=_PLACES))
    )


@dataclass(eq=False)
class _Reader:
    """A sample's text among those of its group."""

    group: _Group
    index: int
    text: list[int]

    @classmethod
    def of(cls, group: _Group) -> Self:
        """Of a text that is new in the group."""
        group.texts.append([])
        return cls(group, len(group.texts) - 1, group.texts[-1])

    def read(self, token_ids: Sequence[int], found: bool = True) -> None:
        """Add tokens to the text; `found`: and to the places."""
        start, text, places = len(self.text), self.text, self.group.places
        text += token_ids
        for end in range(max(start + 1, _GRAM), len(text) + 1) if found else ():
            places[tuple(text[end - _GRAM : end])].append((self.index, end))

    def match(self) -> tuple[int, int, int]:
        """(length of the longest match, text, end of the match in it); length 0: none."""
        text, best = self.text, (0, 0, 0)
        for index, end in reversed(self.group.places.get(tuple(text[-_GRAM:]), ())):
            other, length = self.group.texts[index], _GRAM
            if end == len(other):  # nothing is known to follow; its own end too
                continue
            most, longer = min(_LONGEST, len(text), end), best[0] + 1
            if longer > most or text[-longer:] != other[end - longer : end]:
                continue
            same = text[-most:] == other[end - most : end]  # mostly so where a text is in a loop
            length = most if same else max(length, longer)
            while length < most and text[-length - 1] == other[end - length - 1]:
                length += 1
            best = length, index, end
        return best

    def following(self, index: int, end: int, num_tokens: int) -> list[int]:
        """The tokens behind a place; those of its own text go on as far as it is guessed."""
        if index != self.index:
            return self.group.texts[index][end : end + num_tokens]
        period = len(self.text) - end
        behind = self.text[end : end + num_tokens]
        return [behind[i % period] for i in range(num_tokens)]


class Suffix(Proposer):
    """Guesses by the texts of a prompt's samples; see the file's head."""

    def __init__(self, parts: ProposerParts) -> None:
        super().__init__(parts)
        self._groups: WeakValueDictionary[str, _Group] = WeakValueDictionary()
        self._readers: WeakKeyDictionary[RunningSample, _Reader] = WeakKeyDictionary()

    def propose(self, contexts: Sequence[Context]) -> list[Proposal]:
        return [proposal for proposal, _ in self.matches(contexts)]

    def matches(self, contexts: Sequence[Context]) -> list[tuple[Proposal, int]]:
        """The proposals, each with the length of its match; 0 where there is none."""
        readers = [self._reader(context) for context in contexts]
        found = []
        for reader, context in zip(readers, contexts, strict=True):
            length, text, end = reader.match() if context.room else (0, 0, 0)
            guesses = reader.following(text, end, context.room) if length else []
            found.append((Proposal(guesses), length))
        return found

    def _reader(self, context: Context) -> _Reader:
        """The sample's reader, which has read all of its tokens."""
        sample = context.sample
        reader = self._readers.get(sample)
        if reader is None:
            group = self._groups.setdefault(sample.request.request_id, _Group())
            reader = self._readers[sample] = _Reader.of(group)
            reader.read(sample.request.prompt_ids, found=reader.index == 0)
        reader.read(context.token_ids[len(reader.text) :].tolist())
        return reader
