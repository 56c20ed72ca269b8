"""What was drawn against what a trainer finds by one forward pass of the weights that drew it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from samebit.recipes.config import GrpoRun
from samebit.recipes.run.batches import own_micro_batches, rows_by_sample
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.stats import Comparison
from samebit.trainer.types import MicroBatch, Sample

type Forward = Callable[[Sequence[MicroBatch]], Sequence[Tensor]]
"""The log-probs of micro-batches' loss rows [R], under the weights that drew."""


def compare(
    drawn: Sequence[tuple[Sample, int]], forward: Forward, run: GrpoRun, trainer: MegatronTrainer
) -> Comparison:
    """Compare the drawn tokens of each sample from a place in it on; the same on every rank.

    trainer: whose ranks share the samples.
    """
    if not drawn:
        return Comparison()
    samples = [sample for sample, _ in drawn]
    settings, temperature = run.trainer, run.rollout.temperature
    copies = -(-settings.parallel.data // len(samples))  # a micro-batch for every rank
    batches = own_micro_batches(samples * copies, settings, trainer, temperature)
    logprobs = rows_by_sample(batches, forward(batches))
    found = Comparison()
    for sample, start in drawn:
        is_drawn = sample.loss_mask & (np.arange(len(sample.token_ids)) >= start)
        places = torch.from_numpy(np.flatnonzero(is_drawn))
        ours = torch.from_numpy(sample.in_place(logprobs[sample.sample_id], "logprobs"))
        found += Comparison.of_sample(sample, places, ours[places])
    return found
