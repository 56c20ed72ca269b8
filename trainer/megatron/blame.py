"""Whose gradient is not finite: equal inputs give equal gradients, so each is computed alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

import torch

from samebit.trainer.packing import pack_samples, units_of
from samebit.trainer.types import MicroBatch, NonFiniteError

Check = Callable[[Sequence[MicroBatch]], bool]
"""Computes the gradients of micro-batches, and says whether they are finite."""


def blame_gradients(
    batches: Sequence[MicroBatch], step: int, device: torch.device, are_finite: Check
) -> NoReturn:
    """Raise NonFiniteError for a step whose summed gradients are not finite.

    It names the micro-batch and the sample, if one alone is to blame.
    """
    for batch in batches:
        if not are_finite([batch]):
            raise NonFiniteError(
                f"gradient is NaN or Inf at step {step}, micro-batch {batch.index}, "
                f"{_blamed(batch, device, are_finite)}; the weights are unchanged"
            )
    raise NonFiniteError(
        f"the sum of the gradients overflows at step {step}; the weights are unchanged"
    )


def _blamed(batch: MicroBatch, device: torch.device, are_finite: Check) -> str:
    """Which sample's gradient is not finite by itself; all of them if only their sum is not."""
    for unit in units_of(batch.samples):
        [packed] = pack_samples(
            unit, batch.num_tokens, temperature=batch.temperature, device=device
        )
        here = [any(s is sample for sample in unit) for s in batch.samples]
        rows = torch.tensor(here, device=device)[batch.sample_of_row].nonzero().squeeze(1)
        kept = None if batch.kept is None else batch.kept.select(rows)
        if not are_finite([replace(packed, index=batch.index, kept=kept)]):
            return f"sample {unit[0].sample_id}"
    ids = [sample.sample_id for sample in batch.samples]
    return f"samples {ids[0]} to {ids[-1]} together"
