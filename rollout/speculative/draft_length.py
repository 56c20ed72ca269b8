"""DraftLength: how many tokens are worth guessing, for a batch, by how often guesses were right.

It counts, and looks at no clock: all ranks decide alike, and a run repeats itself. No decision made
here can change a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from samebit.rollout.runtime.graph_rows import graph_rows
from samebit.rollout.speculative.accept_lengths import num_beyond

FREE_ROWS = {"cpu": 16, "cuda": 128}
"""Rows that a step may have until they cost as much again as reading the weights once. By rates,
not by a measurement: a row takes two operations for a weight of two bytes, and the peaks of an H200
(989 T/s, 4.8 TB/s) are 206 operations to a byte; products of few rows reach well less of theirs."""
ROUND = 0.05
"""What a round of guesses costs besides rows and drafts, in steps that guess nothing: it is planned
when the step before has ended. An estimate, too; it also keeps guesses away that hardly pay."""
_MEMORY = 0.95  # of what was counted, with each round of guesses
_HOPED, _WEIGHT = 0.8, 2.0  # acceptance, as if counted in so many rounds before the first
_FIRST = 0.5  # round before the first in which all samples had guesses
_FIRST_WAIT, _LONGEST_WAIT = 8, 128  # steps without guesses before one more round is tried


@dataclass(frozen=True)
class StepCost:
    """What a step costs, as a multiple of reading the target's weights once."""

    free_rows: int
    """See FREE_ROWS."""
    pads: bool
    """Whether decode steps are CUDA graphs, whose rows are rounded up."""
    draft: float = 0.0
    """Of each guess in turn; see Proposer.cost."""
    round: float = ROUND
    """Of a step that guesses at all."""

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Of the target, without guessing."""
        return 1 + rows / self.free_rows

    def of_guessing(self, most: np.ndarray | int) -> np.ndarray:
        """Of making up to so many guesses for each sample."""
        return np.where(np.asarray(most) > 0, self.round + most * self.draft, 0.0)

    def rows(self, num_guessed: np.ndarray, num_samples: int, num_others: int = 0) -> np.ndarray:
        """Rows [k + 1] of steps that verify up to 0, 1, ... k guesses of each sample; inf where
        guesses would cost a step its graph.

        num_guessed [k]: samples with a first, a second, ... guess; num_others: rows of chunks,
        which have no graph.
        """
        if num_others == 0 and self.pads:
            found = [graph_rows(num_samples, most) for most in range(len(num_guessed) + 1)]
            if found[0] is not None:
                return np.array([np.inf if rows is None else rows for rows in found])
        return num_others + num_samples + np.concatenate([[0.0], np.cumsum(num_guessed)])


class DraftLength:
    """The most guesses for each sample of a step: before they are made, and once they are.

    What counts is tokens by cost: a step yields one for each sample and what is expected of its
    guesses. How much that is, is counted in rounds, steps in which guesses were asked for: which
    share of the samples had any, and how often they were right in each place. Where guessing does
    not pay it is left for some steps and then tried for one round: if that pays the count begins
    anew, else it is left for twice as long.
    """

    def __init__(self, most: int, adaptive: bool, cost: StepCost) -> None:
        self._most = most
        self._adaptive = adaptive
        self._cost = cost
        self._begin()
        self._wait = _FIRST_WAIT
        self._waited = 0  # steps that guessed nothing
        self._asked = 0  # guesses of the newest round
        self._trying = False  # whether that is one to see whether guessing pays again

    def _begin(self) -> None:
        self._rounds, self._covered = _FIRST, _FIRST  # all, and samples with guesses in them
        self._tried = np.zeros(self._most)  # guesses behind right ones, in rounds
        self._right = np.zeros(self._most)
        self._tried[0], self._right[0] = _WEIGHT, _WEIGHT * _HOPED

    def choose(self, num_samples: int, most: int | None = None) -> int:
        """How many guesses to ask for, of each of so many decoding samples; 0: none would pay.

        most: of which there can be no more, where that is less than the engine's.
        """
        if not self._adaptive:
            return self._most
        self._trying = False
        most = self._most if most is None else min(most, self._most)
        self._asked = self._best(num_samples, most, self._covered / self._rounds, self._rates())
        if self._asked:
            self._waited = 0
            return self._asked
        self._waited += 1
        if self._waited > self._wait:
            self._asked = self._best(num_samples, most, 1.0, np.full(self._most, _HOPED))
            self._trying = self._asked > 0
        if self._trying:
            self._waited = 0
        return self._asked

    def cut(self, lens: np.ndarray, likely: Mapping[int, np.ndarray], num_others: int) -> int:
        """How many guesses of each sample to verify, of those that were made: lens [B].

        likely: by sample, where that is known, how likely each of its guesses and all before it are
        right. num_others: the step's rows of chunks.
        """
        most = int(lens.max(initial=0))
        if not self._adaptive or not most:
            return most
        unknown = np.delete(lens, list(likely))
        right = num_beyond(unknown, most) * np.cumprod(self._rates()[:most])
        for chain in likely.values():
            right[: len(chain)] += chain
        tokens = len(lens) + np.concatenate([[0.0], np.cumsum(right)])
        rows = self._cost.rows(num_beyond(lens, most), len(lens), num_others)
        cost = self._cost.of_rows(rows) + self._cost.of_guessing(self._asked)
        return int(np.argmax(tokens / cost))

    def learn(self, lens: np.ndarray, counts: np.ndarray) -> None:
        """Take in a round's outcome: lens [B], the guesses that were verified of each sample, and
        counts [B], the tokens that it got; zeros and ones where there was nothing to verify."""
        if not self._adaptive:
            return
        if self._trying:
            self._trying = False
            if not self._has_paid(lens, counts):
                self._wait = min(2 * self._wait, _LONGEST_WAIT)
                return
            self._wait = max(self._wait // 2, _FIRST_WAIT)
            self._begin()
        self._rounds = _MEMORY * self._rounds + 1
        self._covered = _MEMORY * self._covered + (lens > 0).mean()
        if not lens.any():
            return
        right = num_beyond(counts - 1, self._most)
        tried = num_beyond(np.minimum(lens, counts), self._most)  # those before were right
        self._tried = _MEMORY * self._tried + (tried > 0)
        self._right = _MEMORY * self._right + right / np.maximum(tried, 1)

    def _has_paid(self, lens: np.ndarray, counts: np.ndarray) -> bool:
        """Whether a round has yielded more for its cost than a step without guesses."""
        most, size = int(lens.max()), len(lens)
        rows = self._cost.rows(num_beyond(lens, most), size)
        plain, own = self._cost.of_rows(rows[[0, most]])
        return bool(counts.sum() * plain > size * (own + self._cost.of_guessing(self._asked)))

    def _best(self, num_samples: int, most: int, coverage: float, rates: np.ndarray) -> int:
        """What yields the most for its cost, of 0 to `most` guesses for samples of which a share
        has any."""
        right = coverage * np.cumprod(rates[:most])
        tokens = num_samples * (1 + np.concatenate([[0.0], np.cumsum(right)]))
        rows = self._cost.rows(np.full(most, coverage * num_samples), num_samples)
        cost = self._cost.of_rows(rows) + self._cost.of_guessing(np.arange(most + 1))
        return int(np.argmax(tokens / cost))

    def _rates(self) -> np.ndarray:
        """How likely a guess is right behind right ones, [most]: a place that is seldom reached is
        taken to be as the one before."""
        rates = np.empty(self._most)
        rate, weight = 0.0, 0.0
        for i in range(self._most):
            rate = (self._right[i] + weight * rate) / (self._tried[i] + weight)
            rates[i], weight = rate, _WEIGHT
        return rates
