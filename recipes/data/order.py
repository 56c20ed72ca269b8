"""Which problem comes when, and which id a sample has: functions of indices, never of time."""

from functools import lru_cache

import torch
from torch import Tensor

_STEP_BITS, _PROMPT_BITS, _SAMPLE_BITS = 31, 20, 12


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(size, generator=generator)


def problem_index(position: int, size: int, seed: int) -> int:
    """Return the problem at a place of the endless training order, shuffled anew every epoch."""
    return int(_permutation(size, seed, position // size)[position % size])


class SampleIds:
    """Gives 64-bit sample ids, none of them twice in a run.

    From the top: 1 bit for evaluation, 31 bits step, 20 bits prompt, 12 bits sample.
    """

    def __init__(self) -> None:
        self._last_step = {False: -1, True: -1}

    def of_step(
        self, step: int, num_prompts: int, num_samples: int, *, evaluation: bool = False
    ) -> list[list[int]]:
        """Return a step's ids [prompts][samples]; raises ValueError if they were given before."""
        if step <= self._last_step[evaluation]:
            raise ValueError(
                f"sample ids of step {step} (evaluation={evaluation}) were used in this run"
            )
        for name, value, bits in (
            ("step", step + 1, _STEP_BITS),
            ("prompts per step", num_prompts, _PROMPT_BITS),
            ("samples per prompt", num_samples, _SAMPLE_BITS),
        ):
            if value > 1 << bits:
                raise ValueError(
                    f"{name} = {value} exceed the {1 << bits} that sample ids can name"
                )
        self._last_step[evaluation] = step
        base = (int(evaluation) << _STEP_BITS | step) << _PROMPT_BITS
        return [
            [(base | prompt) << _SAMPLE_BITS | sample for sample in range(num_samples)]
            for prompt in range(num_prompts)
        ]
