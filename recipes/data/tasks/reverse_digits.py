"""Task `reverse_digits`: write a string of digits backwards.

The prompt is the digits and an equals sign ("482913="), the label the digits reversed ("319284").

A hash of the digits alone decides which split a string belongs to: about one in eight is held out,
whatever the seed. A split draws strings for (seed, index, attempt), attempt after attempt, until
one belongs to it. So no string is ever in both splits, and each problem depends on its index only.
"""

import hashlib
from typing import Any

from samebit.recipes.data.tasks.base import DataConfig, Dataset, Problem, check_index


class ReverseDigits:
    """Draws one split of the task."""

    def __init__(self, *, length: int, seed: int, size: int, held_out: bool) -> None:
        self._length = length
        self._seed = seed
        self._size = size
        self._held_out = held_out

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Problem:
        check_index(index, self._size)
        attempt = 0
        while _is_held_out(digits := self._draw(index, attempt)) != self._held_out:
            attempt += 1
        return Problem(index=index, prompt=f"{digits}=", label=digits[::-1], metadata={})

    def _draw(self, index: int, attempt: int) -> str:
        key = f"{self._seed}:{self._held_out}:{index}:{attempt}"
        # Eight bytes more than the digits need make the modulo's bias negligible.
        random = hashlib.shake_256(key.encode()).digest(self._length + 8)
        return f"{int.from_bytes(random) % 10**self._length:0{self._length}d}"


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return the train and held-out split; raises ValueError for unknown or bad arguments."""
    length = _length(config.args)
    train = ReverseDigits(length=length, seed=config.seed, size=config.size, held_out=False)
    held_out = ReverseDigits(length=length, seed=config.seed, size=config.eval_size, held_out=True)
    return train, held_out


def _length(args: dict[str, Any]) -> int:
    unknown = sorted(args.keys() - {"length"})
    if unknown:
        raise ValueError(f"data.args has {unknown}; the task 'reverse_digits' takes only 'length'")
    length = args.get("length", 6)
    # One digit makes ten strings, too few for two splits.
    if isinstance(length, bool) or not isinstance(length, int) or not 2 <= length <= 1000:
        raise ValueError(f"data.args.length is {length!r}; give a whole number from 2 to 1000")
    return length


def _is_held_out(digits: str) -> bool:
    return hashlib.sha256(digits.encode()).digest()[0] % 8 == 0
