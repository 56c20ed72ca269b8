"""StepTimes: how long decode steps take in which nothing is guessed, by their samples."""

import statistics
from collections import deque

_KEPT = 32
_LEAST = 4  # the first of a size compile and record


class StepTimes:
    """Remembers the last steps of every size, to the next power of two. What is guessed never
    depends on them."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}

    def add(self, num_samples: int, seconds: float) -> None:
        """Take in a step without guesses and without prompts."""
        size = (num_samples - 1).bit_length()
        self._seconds.setdefault(size, deque(maxlen=_KEPT)).append(seconds)

    def typical(self, num_samples: int) -> float | None:
        """Return what a step of so many samples takes, the median of the last: of the nearest size
        that was seen often enough, or None."""
        size = (num_samples - 1).bit_length()
        known = [s for s, seconds in self._seconds.items() if len(seconds) >= _LEAST]
        nearest = min(known, key=lambda s: abs(s - size), default=None)
        return None if nearest is None else statistics.median(self._seconds[nearest])
