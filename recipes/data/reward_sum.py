"""Several rewards as one: their weighted sum, in the order in which they are given."""

import math
from collections.abc import Sequence

from samebit.recipes.data.rewards import Poll, RewardError, Scorer, describe
from samebit.recipes.data.tasks.base import Problem


class RewardSum:
    """Scores completions by several functions, one after another."""

    def __init__(
        self, labels: Sequence[str], weights: Sequence[float], scorers: Sequence[Scorer]
    ) -> None:
        """One of each for every term, in the order of the sum."""
        self.name = " + ".join(labels)
        self.labels = tuple(labels)
        self._weights, self._scorers = tuple(weights), tuple(scorers)

    def check(self, problems: Sequence[Problem], poll: Poll) -> list[str]:
        """Return for each problem what the first term that cannot use it says, or an empty text."""
        found = [scorer.check(problems, poll) for scorer in self._scorers]
        return [next(filter(None, faults), "") for faults in zip(*found, strict=True)]

    def score_terms(
        self, texts: Sequence[str], problems: Sequence[Problem], poll: Poll
    ) -> list[list[float]]:
        """Return every term's rewards [terms][completions], without weights; see rewards.score."""
        return [scorer.score(texts, problems, poll) for scorer in self._scorers]

    def score(self, texts: Sequence[str], problems: Sequence[Problem], poll: Poll) -> list[float]:
        """Return the weighted sums in order; see rewards.score."""
        return self.sums(self.score_terms(texts, problems, poll), texts, problems)

    def sums(
        self, terms: Sequence[Sequence[float]], texts: Sequence[str], problems: Sequence[Problem]
    ) -> list[float]:
        """Return the weighted sums of terms [terms][completions], added in fp64 from left to right.

        Raises RewardError, naming the problem and the completion, for one that is not finite.
        """
        found = []
        for i, values in enumerate(zip(*terms, strict=True)):
            total = 0.0
            for weight, value in zip(self._weights, values, strict=True):
                total += weight * value
            if not math.isfinite(total):
                where = describe(self.name, texts[i], problems[i])
                named = dict(zip(self.labels, values, strict=True))
                raise RewardError(f"{where} is {total}, of {named}; the sum must be finite")
            found.append(total)
        return found

    def close(self) -> None:
        """Let go of what the terms run in. A second call does nothing."""
        for scorer in self._scorers:
            scorer.close()
