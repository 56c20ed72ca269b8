"""PromptTexts: what samples of a prompt have drawn, those before too, as one suffix automaton.

As long as samples of the prompt run, their texts and the kept ones are in the automaton, which
reads them a bounded number of tokens at a time. Of samples that are gone the last completions are
kept, as plain tokens: with the last sample the automaton goes, and is made anew for the next one.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from samebit.rollout.speculative.suffix_automaton import SuffixAutomaton

MOST_COMPLETIONS = 32
"""Completions that are kept of a prompt, the newest."""
_MOST_GONE = 1024  # texts of samples that are gone in an automaton before it is made anew


@dataclass(eq=False, slots=True)
class Text:
    """A prompt, or what follows one in a sample."""

    index: int
    """Its place among the texts of its prompt; the prompt is 0."""
    token_ids: list[int] = field(default_factory=list)
    num_read: int = 0
    state: int = -1
    """The automaton's, of the prompt and what is read of this behind it; -1: not of all of the
    prompt."""


class PromptTexts:
    """The texts of one prompt."""

    def __init__(self, prompt: Sequence[int], key: tuple[int, int]) -> None:
        """key: see PromptLibrary."""
        self.prompt, self.key = array("i", prompt), key
        self.kept: deque[array[int]] = deque()
        self._live: dict[Text, None] = {}
        self._texts: list[Text] = []
        self._unread: list[Text] = []
        self._automaton = SuffixAutomaton()

    @property
    def num_kept(self) -> int:
        """Tokens that are there also while no sample runs."""
        return len(self.prompt) + sum(map(len, self.kept))

    @property
    def is_live(self) -> bool:
        """Whether samples of it run."""
        return bool(self._live)

    @property
    def has_unread(self) -> bool:
        """Whether there are kept texts to read."""
        return bool(self._unread)

    def join(self) -> Text:
        """The text of a new sample, with nothing in it."""
        if not self._live:
            self._begin()
        text = Text(len(self._texts))
        self._texts.append(text)
        self._live[text] = None
        return text

    def leave(self, text: Text) -> None:
        """Keep the text of a sample that is gone, in place of what it goes on from."""
        del self._live[text]
        own = array("i", text.token_ids)
        for earlier in [kept for kept in self.kept if kept == own[: len(kept)]]:
            self.kept.remove(earlier)
        if own:
            self.kept.append(own)
        if len(self.kept) > MOST_COMPLETIONS:
            self.kept.popleft()
        if not self._live:
            self._texts, self._unread, self._automaton = [], [], SuffixAutomaton()
        elif len(self._texts) > len(self._live) + _MOST_GONE:
            self._begin()

    def holds(self, token_ids: Sequence[int]) -> bool:
        """Whether tokens behind the prompt begin with a completion of it."""
        texts = [*self.kept, *(text.token_ids for text in self._live if text.token_ids)]
        return any(
            len(text) <= len(token_ids)
            and text[-1] == token_ids[len(text) - 1]
            and [*text] == [*token_ids[: len(text)]]
            for text in texts
        )

    def go_on(self, text: Text, token_ids: Sequence[int], most: int) -> int:
        """Add tokens to a sample's text; read up to `most` of what is not read of the prompt and
        of it, and return how many they were."""
        text.token_ids += token_ids
        count = 0
        if text.state < 0:
            prompt = self._texts[0]
            count = self._read(prompt, most)
            if prompt.num_read < len(prompt.token_ids):
                return count
            text.state = prompt.state
        return count + self._read(text, most - count)

    def read_kept(self, most: int) -> int:
        """Read up to `most` tokens of kept texts, the newest first; how many they were."""
        count = 0
        while count < most and self._unread:
            text = self._unread[-1]
            count += self.go_on(text, (), most - count)
            if text.num_read == len(text.token_ids):
                self._unread.pop()
        return count

    def match(self, text: Text, num_tokens: int) -> tuple[Sequence[int], int]:
        """(what followed the longest match of a sample's text, up to so many tokens; the match's
        length). A length of 0: there is none, or not all of the text is read."""
        own = text.token_ids
        if text.state < 0 or text.num_read < len(own):
            return (), 0
        length, place = self._automaton.longest(text.state)
        if not length:
            return (), 0
        index, first = place >> 32, place & 0xFFFFFFFF
        behind = self._texts[index].token_ids[first : first + num_tokens]
        if len(behind) < num_tokens and index in (0, text.index):
            # What goes on into the sample's own text goes on as that is guessed.
            if index == 0:
                behind += own[: num_tokens - len(behind)]
            period = len(behind)
            behind += [behind[i % period] for i in range(num_tokens - period)]
        return behind, length

    def _read(self, text: Text, most: int) -> int:
        first, token_ids = text.num_read, text.token_ids
        unread = token_ids[first : first + most]
        if unread:
            place = text.index << 32 | first
            text.state = self._automaton.read(text.state, unread, place)
            text.num_read = first + len(unread)
        return len(unread)

    def _begin(self) -> None:
        """Read everything anew: the prompt, what is kept, and what samples have."""
        self._automaton = SuffixAutomaton()
        self._unread = [Text(1 + i, kept.tolist()) for i, kept in enumerate(self.kept)]
        self._texts = [Text(0, self.prompt.tolist()), *self._unread, *self._live]
        for index, text in enumerate(self._texts):
            text.index, text.num_read, text.state = index, 0, -1
        self._texts[0].state = 0
