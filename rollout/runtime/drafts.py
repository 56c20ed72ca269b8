"""Drafts: tokens that are guessed to follow, which one forward verifies.

A decoding sample has a row for its newest token, and behind it one for each guess. In every row the
target draws its own token, by the noise of its position. As long as a guess is that token, the next
row's context is the sample's, and so is what is drawn there; rows behind a wrong guess are dropped,
and later tokens overwrite their keys and values.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Drafts:
    """The guesses for the B decoding samples of a step, in its order; R = B + sum(lens) rows."""

    lens: np.ndarray  # [B] int64, from 0 on
    token_ids: np.ndarray  # [sum(lens)] int64

    @cached_property
    def most(self) -> int:
        """The most guesses of a sample."""
        return int(self.lens.max())

    def cut(self, most: int) -> "Drafts":
        """Without what is guessed behind so many tokens of each sample."""
        kept = self.offsets[self.rows] <= most
        return Drafts(np.minimum(self.lens, most), self.token_ids[kept])

    @cached_property
    def firsts(self) -> np.ndarray:
        """[B]: the row of each sample's newest token."""
        return np.cumsum(self.lens + 1) - (self.lens + 1)

    @cached_property
    def offsets(self) -> np.ndarray:
        """[R]: how far each row is behind its sample's newest token."""
        return np.arange(len(self.lens) + len(self.token_ids)) - self.spread(self.firsts)

    @cached_property
    def rows(self) -> np.ndarray:
        """[sum(lens)]: the guesses' rows."""
        return np.flatnonzero(self.offsets)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Samples' values [B] for each of their rows [R]."""
        return np.repeat(values, self.lens + 1)

    def behind(self, newest: np.ndarray) -> np.ndarray:
        """The tokens of all rows [R], of the samples' newest ones [B]."""
        token_ids = self.spread(newest)
        token_ids[self.rows] = self.token_ids
        return token_ids

    def holding(self, token_ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """[R] bool: rows whose drawn token is the sample's; the first of each sample always is.

        token_ids [R]: drawn in the rows; ends [R] bool: tokens that end their sample.
        """
        breaks = np.zeros(len(self.offsets), dtype=np.int64)
        breaks[self.rows] = (token_ids[self.rows - 1] != self.token_ids) | ends[self.rows - 1]
        breaks = np.cumsum(breaks)
        return breaks == self.spread(breaks[self.firsts])

    def counts(self, holding: np.ndarray) -> np.ndarray:
        """[B]: how many of each sample's rows hold."""
        return np.add.reduceat(holding.astype(np.int64), self.firsts)
