"""PromptLibrary: prompts by their tokens, with what their samples have drawn, of late.

What is kept is a function of the samples that came and went, in their order: nothing depends on
when an object dies, or on a hash that is another one in each process.
"""

from array import array
from collections import Counter

import numpy as np

from samebit.rollout.speculative.prompt_texts import PromptTexts, Text

MOST_TOKENS = 1 << 20
"""Tokens that are kept of all prompts, theirs and their completions'; four bytes each."""
_BASE = np.uint64(0x9E3779B97F4A7C15)  # of a polynomial modulo 2**64


class PromptLibrary:
    """The texts of all prompts that are known. The least recently used go first, but for those
    whose samples run."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], PromptTexts] = {}  # by length and hash
        self._lengths: Counter[int] = Counter()
        self._powers = np.zeros(0, dtype=np.uint64)
        self.num_tokens = 0
        """Tokens that are kept: at most MOST_TOKENS, besides those of prompts whose samples run."""

    def __len__(self) -> int:
        return len(self._known)

    def open(self, token_ids: np.ndarray) -> PromptTexts:
        """The texts that a new sample of a prompt [n] int32 belongs to.

        A prompt that goes on from a known one with a completion of it belongs there, as that of a
        sample that is drawn in parts does; the longest such one.
        """
        hashes, prompt = self._hashes(token_ids), array("i", token_ids.tobytes())
        for length in sorted(self._lengths, reverse=True):
            if length > len(prompt):
                continue
            key = length, int(hashes[length - 1])
            texts = self._known.get(key)
            if texts is None or texts.prompt != prompt[:length]:
                continue
            if length == len(prompt) or texts.holds(prompt[length:]):
                self._known[key] = self._known.pop(key)
                return texts
        key = len(prompt), int(hashes[-1])
        texts = PromptTexts(prompt, key)
        if key not in self._known:  # another prompt may have this hash: then it is not kept
            self._known[key] = texts
            self._lengths[len(prompt)] += 1
            self.num_tokens += texts.num_kept
            self._bound()
        return texts

    def leave(self, texts: PromptTexts, text: Text) -> None:
        """Take in that a sample is gone; see PromptTexts.leave."""
        before = texts.num_kept
        texts.leave(text)
        if self._known.get(texts.key) is texts:
            self.num_tokens += texts.num_kept - before
            self._bound()

    def _bound(self) -> None:
        """Forget prompts until what is kept is within the bound."""
        if self.num_tokens <= MOST_TOKENS:
            return
        for key, texts in list(self._known.items()):
            if not texts.is_live:
                del self._known[key]
                self.num_tokens -= texts.num_kept
                self._lengths -= Counter([key[0]])  # leaves no length without a prompt
            if self.num_tokens <= MOST_TOKENS:
                return

    def _hashes(self, token_ids: np.ndarray) -> np.ndarray:
        """[n] uint64: of the first 1, 2, .. n tokens [n]."""
        if len(self._powers) < len(token_ids):
            factors = np.full(2 * len(token_ids), _BASE, dtype=np.uint64)
            self._powers = np.multiply.accumulate(factors)
        return np.cumsum((token_ids.astype(np.uint64) + 1) * self._powers[: len(token_ids)])
