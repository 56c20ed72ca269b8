"""Suffix: what followed the longest suffix of the text when it stood there before.

It looks in the sample's own prompt and completion, in those of the prompt's other samples as far as
they are, and in what earlier samples of the prompt have drawn: the longest match, of those the
newest. There is no model. What a step costs the host is bounded: each text goes on in its automaton
from where it was, and what is long, as a prompt or an earlier text, is read in parts, step by step.
Until a sample's own text is read nothing is guessed for it.
Source: Oliaro et al. 2024 (SuffixDecoding), arXiv 2411.04975; an automaton in place of a tree.
"""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import ref

from samebit.rollout.runtime.running_sample import RunningSample, Status
from samebit.rollout.speculative.prompt_library import PromptLibrary
from samebit.rollout.speculative.prompt_texts import PromptTexts, Text
from samebit.rollout.speculative.proposer import Context, Proposal, Proposer, ProposerParts

_DRAWN = 16  # new tokens of a sample that are read in any step: what it draws in one
_BEHIND = 2048  # others that are read in a step, over all samples


class _Reader(NamedTuple):
    """A sample's text, among those of its prompt."""

    texts: PromptTexts
    text: Text
    start: int
    """Where the text begins in the sample's context."""


class Suffix(Proposer):
    """Guesses by the texts of a prompt's samples; see the file's head."""

    def __init__(self, parts: ProposerParts) -> None:
        super().__init__(parts)
        self._library = PromptLibrary()
        self._readers: dict[ref[RunningSample], _Reader] = {}
        self._behind: dict[PromptTexts, None] = {}  # with kept texts to read

    def propose(self, contexts: Sequence[Context]) -> list[Proposal]:
        nothing = Proposal()
        return [
            Proposal(token_ids) if length else nothing
            for token_ids, length in self.matches(contexts)
        ]

    def matches(self, contexts: Sequence[Context]) -> list[tuple[Sequence[int], int]]:
        """For each context what followed its match, and the match's length; 0: there is none."""
        left, known, self.is_preparing = _BEHIND, self._readers, False
        readers = [known.get(ref(c.sample)) or self._new(c) for c in contexts]
        for (texts, text, start), context in zip(readers, contexts, strict=True):
            new = context.token_ids[start + len(text.token_ids) :].tolist()
            free = _DRAWN if len(new) <= _DRAWN else 0
            left -= max(texts.go_on(text, new, left + free) - free, 0)
            self.is_preparing |= text.state < 0
        self._read_kept(left)
        if len(known) > len(contexts):
            self._let_go()
        return [
            texts.match(text, context.room) if context.room else ((), 0)
            for (texts, text, _), context in zip(readers, contexts, strict=True)
        ]

    def _new(self, context: Context) -> _Reader:
        """The reader of a sample that is new."""
        prompt = context.token_ids[: context.sample.prompt_len]
        texts = self._library.open(prompt)
        reader = _Reader(texts, texts.join(), len(texts.prompt))
        self._readers[ref(context.sample)] = reader
        if texts.has_unread:
            self._behind[texts] = None
        return reader

    def _read_kept(self, left: int) -> None:
        """Read what is kept of the prompts whose samples run, up to so many tokens."""
        for texts in list(self._behind) if left else ():
            left -= texts.read_kept(left)
            if not texts.has_unread:
                del self._behind[texts]
            if left <= 0:
                return

    def rest(self) -> None:
        """See Proposer."""
        self._let_go()

    def _let_go(self) -> None:
        """Of samples that are finished. The engine holds the others: so it does not matter when
        somebody lets go of a finished one, and all ranks do the same."""
        for key, reader in list(self._readers.items()):
            sample = key()
            if sample is None or sample.status is Status.FINISHED:
                del self._readers[key]
                self._library.leave(reader.texts, reader.text)
                if reader.texts.has_unread:
                    self._behind[reader.texts] = None
