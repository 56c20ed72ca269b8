"""Which problem comes when, and which id a sample has: functions of indices, never of time."""

from functools import lru_cache

import torch
from torch import Tensor

_STEP_BITS, _PROMPT_BITS, _SAMPLE_BITS = 31, 20, 12
MAX_PROMPTS = 1 << _PROMPT_BITS
"""Sample ids can name so many prompts of a step."""


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
