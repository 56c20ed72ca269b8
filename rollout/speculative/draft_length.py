"""DraftLength: how many tokens are worth guessing, for a batch, by how often guesses were right.

It counts, and looks at no clock: all ranks decide alike, and a run repeats itself. No decision made
here can change a token.
"""

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
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

    def rows(self, num_samples: int, most: int, num_guessed: float, num_others: int = 0) -> float:
        """Rows of a step with up to `most` guesses of each sample, num_guessed of all; inf where
        they would cost it its graph. num_others: rows of chunks, beside which there is no graph."""
        if num_others == 0 and self.pads and graph_rows(num_samples, 0) is not None:
            rows = graph_rows(num_samples, most)
            return math.inf if rows is None else rows
        return num_samples + num_guessed + num_others

    def of(self, rows: float, asked: int) -> float:
        """Of a step with so many rows, for which up to `asked` guesses of each sample were made."""
        guessing = self.round + asked * self.draft if asked else 0.0
        return 1 + rows / self.free_rows + guessing


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
        self._asked = self._worth(num_samples, most, self._covered / self._rounds, self._rates())
        if self._asked:
            self._waited = 0
            return self._asked
        self._waited += 1
        if self._waited > self._wait:
            self._asked = self._worth(num_samples, most, 1.0, [_HOPED] * most)
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
        unknown = np.delete(lens, list(likely)) if likely else lens
        rates = [_HOPED] * most if self._trying else self._rates()[:most]
        right = num_beyond(unknown, most) * np.cumprod(rates)
        for chain in likely.values():
            right[: len(chain)] += chain
        guessed = num_beyond(lens, most).tolist()
        return self._best(len(lens), right.tolist(), guessed, num_others, self._asked)

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
        size, cost = len(lens), self._cost
        plain = cost.of(cost.rows(size, 0, 0), 0)
        own = cost.of(cost.rows(size, int(lens.max()), int(lens.sum())), self._asked)
        return int(counts.sum()) * plain > size * own

    def _worth(self, num_samples: int, most: int, coverage: float, rates: Sequence[float]) -> int:
        """What to ask for, of 0 to `most` guesses for samples of which a share gets any."""
        guessed = coverage * num_samples
        right = [guessed * reached for reached in itertools.accumulate(rates[:most], operator.mul)]
        return self._best(num_samples, right, [guessed] * most)

    def _best(
        self,
        num_samples: int,
        right: Sequence[float],
        guessed: Sequence[float],
        num_others: int = 0,
        asked: int | None = None,
    ) -> int:
        """The most guesses of a sample that yield the most tokens for their cost; the fewest of
        equal ones.

        right, guessed: of the batch's guesses in each place, how many are expected to be right, and
        all. asked: how many were made of each sample; None: as many as are taken.
        """
        best, most_yielded = 0, 0.0
        tokens, extra = float(num_samples), 0.0
        for k in range(len(right) + 1):
            if k:
                tokens, extra = tokens + right[k - 1], extra + guessed[k - 1]
            rows = self._cost.rows(num_samples, k, extra, num_others)
            yielded = tokens / self._cost.of(rows, k if asked is None else asked)
            if yielded > most_yielded:
                best, most_yielded = k, yielded
        return best

    def _rates(self) -> list[float]:
        """How likely a guess is right behind right ones, by place: one that is seldom reached is
        taken to be as the one before."""
        rates: list[float] = []
        weight = 0.0
        for right, tried in zip(self._right.tolist(), self._tried.tolist(), strict=True):
            known = weight * rates[-1] if rates else 0.0
            rates.append((right + known) / (tried + weight))
            weight = _WEIGHT
        return rates
