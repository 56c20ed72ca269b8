"""AcceptLengths: how many guesses were right, in all and place by place."""

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from samebit.rollout.runtime.drafts import Drafts


@dataclass(frozen=True)
class AcceptLengths:
    """Counts over an engine's life, or a part of it; of a decoding sample's steps in which anything
    was guessed."""

    verifications: int
    """Such steps of one sample."""
    tokens: int
    """What they drew: each the tokens that were guessed right, and one more."""
    guessed: tuple[int, ...]
    """[k]: how often there was a first, a second, ... guess."""
    right: tuple[int, ...]
    """[k]: how often it was right, and all before it; not counted behind a completion's end."""
    seconds: float = field(default=0.0, compare=False)
    """That steps took with guesses and without prompts, as far as it is known what steps without
    guesses take."""
    plain_seconds: float = field(default=0.0, compare=False)
    """That as many tokens take without guesses; see StepTimes."""

    @classmethod
    def none(cls, num_draft_tokens: int) -> Self:
        """Nothing was guessed yet."""
        return cls(0, 0, (0,) * num_draft_tokens, (0,) * num_draft_tokens)

    @property
    def num_guessed(self) -> int:
        """Guesses in all places."""
        return sum(self.guessed)

    @property
    def num_right(self) -> int:
        """Guesses that were right."""
        return sum(self.right)

    @property
    def accept_length(self) -> float:
        """Tokens that a verification yields in the mean, from 1 on; NaN without any."""
        return self.tokens / self.verifications if self.verifications else float("nan")

    @property
    def acceptance(self) -> tuple[float, ...]:
        """[k]: the share of each place's guesses that were right; NaN where there were none."""
        pairs = zip(self.right, self.guessed, strict=True)
        return tuple(right / guessed if guessed else float("nan") for right, guessed in pairs)

    @property
    def speedup(self) -> float:
        """How many times as fast the steps with guesses were; NaN where that is not known."""
        return self.plain_seconds / self.seconds if self.seconds > 0 else float("nan")

    def timed(self, seconds: float, plain_seconds: float) -> Self:
        """With a step's time, and with what its tokens take without guesses."""
        own, plain = self.seconds + seconds, self.plain_seconds + plain_seconds
        return replace(self, seconds=own, plain_seconds=plain)

    def plus(self, drafts: Drafts, counts: np.ndarray) -> Self:
        """With a step's: counts [B], the tokens that each of its samples got."""
        places = len(self.guessed)
        guessed, right = num_beyond(drafts.lens, places), num_beyond(counts - 1, places)
        verified = drafts.lens > 0
        sums = int(verified.sum()), int(counts[verified].sum())
        return self + type(self)(*sums, tuple(guessed.tolist()), tuple(right.tolist()))

    def __add__(self, other: Self) -> Self:
        """The counts of both, of engines that guess as many tokens at most."""
        return self._with(other, 1)

    def __sub__(self, earlier: Self) -> Self:
        """What has come to earlier counts of the same engine since."""
        return self._with(earlier, -1)

    def _with(self, other: Self, sign: int) -> Self:
        def places(own: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(a + sign * b for a, b in zip(own, more, strict=True))

        return type(self)(
            self.verifications + sign * other.verifications,
            self.tokens + sign * other.tokens,
            places(self.guessed, other.guessed),
            places(self.right, other.right),
            self.seconds + sign * other.seconds,
            self.plain_seconds + sign * other.plain_seconds,
        )


def num_beyond(values: np.ndarray, places: int) -> np.ndarray:
    """How many of values, integers from 0 on, are above 0, 1, ...; [places] int64."""
    return len(values) - np.cumsum(np.bincount(values, minlength=places))[:places]
