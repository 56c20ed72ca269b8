"""DraftLength: how many tokens are worth guessing, for a batch, by how often guesses were right.

It counts, and looks at no clock: all ranks decide alike, and a run repeats itself. No decision made
here can change a token.
"""

import numpy as np

from samebit.rollout.runtime.drafts import Drafts
from samebit.rollout.speculative.accept_lengths import num_beyond

FREE_ROWS = {"cpu": 16, "cuda": 128}
"""Rows that a step may have until they cost as much again as reading the weights once."""
_MEMORY = 0.98  # of what was counted, with each step
_PRIOR, _PRIOR_WEIGHT = 0.8, 2.0  # acceptance where nothing was counted lately, and steps it counts


class DraftLength:
    """The most guesses for each sample of a step.

    A step costs 1 and its rows' share of free_rows, and draft_cost for each guess in turn; it
    yields a token and what is expected of guesses. What was not tried for long is thought better
    of again, so that a text that has become predictable is noticed.
    """

    def __init__(self, most: int, adaptive: bool, free_rows: int, draft_cost: float) -> None:
        self._most = most
        self._adaptive = adaptive
        self._free_rows = free_rows
        self._draft_cost = draft_cost
        self._tried = np.zeros(most)
        self._right = np.zeros(most)

    def choose(self, num_samples: int) -> int:
        """For a step of so many decoding samples; 0: guessing would not pay."""
        if not self._adaptive:
            return self._most
        self._tried *= _MEMORY
        self._right *= _MEMORY
        rates = (self._right + _PRIOR * _PRIOR_WEIGHT) / (self._tried + _PRIOR_WEIGHT)
        tokens = 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(rates))])
        guesses = np.arange(self._most + 1)
        rows = num_samples * (1 + guesses)
        cost = 1 + rows / self._free_rows + guesses * self._draft_cost
        return int(np.argmax(tokens / cost))

    def learn(self, drafts: Drafts, counts: np.ndarray) -> None:
        """Take in a step's outcome: counts [B], the tokens that each sample got."""
        if not self._adaptive:
            return
        right = num_beyond(counts - 1, self._most)
        tried = num_beyond(np.minimum(drafts.lens, counts), self._most)  # those before were right
        some = tried > 0
        self._tried += some
        self._right[some] += right[some] / tried[some]
