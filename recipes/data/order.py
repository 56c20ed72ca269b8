"""Which problem comes when, and which id a sample has: functions of indices, never of time."""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samebit.weight_sync.coefficients import mix

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_RANGE_BITS = 63  # of a draw
_BLOCK = 4096  # positions whose draws are counted together
_STEP_BITS, _PROMPT_BITS, _SAMPLE_BITS = 31, 20, 12
_TURN_BITS, _TURN_SHIFT = 7, 56
MAX_TURNS = 1 << _TURN_BITS
"""Sample ids can name so many turns of a sample, in steps below MAX_STEPS_OF_TURNS."""
MAX_STEPS_OF_TURNS = 1 << (_STEP_BITS - _TURN_BITS)
MAX_PROMPTS = 1 << _PROMPT_BITS
"""Sample ids can name so many prompts of a step."""


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(size, generator=generator)


def problem_index(position: int, size: int, seed: int) -> int:
    """Return the problem at a place of the endless training order, shuffled anew every epoch."""
    return int(_permutation(size, seed, position // size)[position % size])


def _hashes(key: tuple[int, ...], first: int, count: int) -> NDArray[np.uint64]:
    """The outputs of SplitMix64 at counters from `first` on.

    The words of a key are hashed into its state one after another.
    """
    state = 0
    for word in key:
        state = int(_mixed(np.array([(state + _GAMMA + word) & _MASK], np.uint64))[0])
    counters = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    return _mixed(counters * np.uint64(_GAMMA) + np.uint64(state))


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return mix(torch.from_numpy(z.view(np.int64))).numpy().view(np.uint64)


class _Draws:
    """Which source is drawn at every position, and how often each one was before."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = list(accumulate(map(Fraction, weights)))
        bounds = [int(share / shares[-1] * (1 << _RANGE_BITS)) for share in shares]
        self._bounds = np.array(bounds, np.uint64)
        self._seed = seed
        self._before = [np.zeros(len(bounds), np.int64)]
        """By block: how often each source was drawn in all blocks before it."""
        self._block = -1
        self._sources: list[int] = []
        self._counts: list[int] = []

    def at(self, position: int) -> tuple[int, int]:
        """The source drawn at a position, and how many positions before it drew the same."""
        block, place = divmod(position, _BLOCK)
        if block != self._block:
            self._enter(block)
        return self._sources[place], self._counts[place]

    def _enter(self, block: int) -> None:
        while len(self._before) <= block:
            drawn = np.bincount(self._drawn(len(self._before) - 1), minlength=len(self._bounds))
            self._before.append(self._before[-1] + drawn)
        sources = self._drawn(block)
        counts = np.empty(_BLOCK, np.int64)
        for source, before in enumerate(self._before[block]):
            places = np.flatnonzero(sources == source)
            counts[places] = before + np.arange(len(places))
        self._block, self._sources, self._counts = block, sources.tolist(), counts.tolist()

    def _drawn(self, block: int) -> NDArray[np.intp]:
        values = _hashes((self._seed, 0), block * _BLOCK, _BLOCK) >> np.uint64(64 - _RANGE_BITS)
        return np.searchsorted(self._bounds, values, side="right")


@lru_cache(maxsize=4)
def _draws(weights: tuple[float, ...], seed: int) -> _Draws:
    return _Draws(weights, seed)


@lru_cache(maxsize=64)
def _epoch(size: int, seed: int, source: int, epoch: int) -> NDArray[np.intp]:
    return np.argsort(_hashes((seed, 1, source, epoch), 0, size), kind="stable")


def mixed_index(
    position: int, sizes: Sequence[int], weights: Sequence[float], seed: int
) -> tuple[int, int]:
    """Return (source, record of it) at a place of the endless training order of several sources.

    A hash of (seed, position) draws the source with its weight over the sum of weights. The n-th
    draw of a source gives the record n % size of its epoch n // size; an epoch is all of its
    records in the order of hashes of (seed, source, epoch, record). So each source is passed
    through whole before any of its records comes again, whatever the others do.
    """
    source, count = _draws(tuple(weights), seed).at(position)
    epoch, place = divmod(count, sizes[source])
    return source, int(_epoch(sizes[source], seed, source, epoch)[place])


def turn_id(sample_id: int, turn: int) -> int:
    """Return the sample id under which a turn of a sample is drawn; that of turn 0 is its own.

    The upper 7 of the 31 bits of the step hold the turn. Raises ValueError for one of them that is
    not free, or a turn that they cannot name.
    """
    if not 0 <= turn < MAX_TURNS or sample_id >> _TURN_SHIFT & (MAX_TURNS - 1):
        raise ValueError(
            f"turn {turn} of sample {sample_id:#x} has no id; turns are below {MAX_TURNS}, steps "
            f"below {MAX_STEPS_OF_TURNS}"
        )
    return sample_id | turn << _TURN_SHIFT


class SampleIds:
    """Gives 64-bit sample ids, none of them twice in a run.

    From the top: 1 bit for evaluation, 31 bits step, 20 bits prompt, 12 bits sample.
    """

    def __init__(self) -> None:
        self._behind = {False: (0, 0), True: (0, 0)}  # step and prompt

    def of_step(
        self,
        step: int,
        num_prompts: int,
        num_samples: int,
        *,
        evaluation: bool = False,
        first_prompt: int = 0,
    ) -> list[list[int]]:
        """Return a step's ids [prompts][samples], from a prompt on.

        Raises ValueError if they, or later ones, were given before.
        """
        end = first_prompt + num_prompts
        if (step, first_prompt) < self._behind[evaluation]:
            raise ValueError(
                f"sample ids of step {step} (evaluation={evaluation}) were used in this run"
            )
        for name, value, bits in (
            ("step", step + 1, _STEP_BITS),
            ("prompts per step", end, _PROMPT_BITS),
            ("samples per prompt", num_samples, _SAMPLE_BITS),
        ):
            if value > 1 << bits:
                raise ValueError(
                    f"{name} = {value} exceed the {1 << bits} that sample ids can name"
                )
        self._behind[evaluation] = step, end
        base = (int(evaluation) << _STEP_BITS | step) << _PROMPT_BITS
        return [
            [(base | prompt) << _SAMPLE_BITS | sample for sample in range(num_samples)]
            for prompt in range(first_prompt, end)
        ]
