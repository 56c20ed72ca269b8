"""The samples of an optimizer step, as what a trainer computes, and its reference of them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from samebit.trainer.config import TrainerConfig
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import MicroBatch, Sample
from samebit.weight_sync.objects import gather_objects


def own_micro_batches(
    samples: Sequence[Sample],
    settings: TrainerConfig,
    trainer: MegatronTrainer,
    temperature: float = 1.0,
) -> list[MicroBatch]:
    """Pack an optimizer step's samples; returns the micro-batches that this data rank computes.

    With gradient segments there may be none. temperature: the rollout's. Raises ValueError as
    pack_samples and share_batches do.
    """
    batches = pack_samples(
        samples,
        settings.micro_batch_tokens,
        settings.loss_mean,
        temperature,
        trainer.device,
        trainer.model,
        at_least=1 if trainer.grad_segments else trainer.parallel.data,
        loss_mean_tokens=settings.loss_mean_tokens,
        num_segments=trainer.grad_segments or 1,
    )
    return trainer.own_batches(batches)


def compared_under(batches: Sequence[MicroBatch], step: int) -> list[MicroBatch]:
    """Return the micro-batches for weights of this optimizer step: no log-prob is to be the
    rollout's of a sample whose newest tokens, or all of whose, others drew."""

    def marked(batch: MicroBatch) -> MicroBatch:
        drew = [s.version_spans[-1:] for s in batch.samples]
        present = torch.tensor([not x or x[0].version.step == step for x in drew])
        by_present = present.to(batch.is_compared.device)[batch.sample_of_row]
        return replace(batch, is_compared=batch.is_compared & by_present)

    return [marked(batch) for batch in batches]


def rows_by_sample(batches: Sequence[MicroBatch], rows: Sequence[Tensor]) -> dict[int, list[float]]:
    """By sample id, what every rank has found for the loss rows [R] of its micro-batches."""
    own: dict[int, list[float]] = {}
    for batch, found in zip(batches, rows, strict=True):
        parts = found.split(batch.row_counts.tolist())
        own |= {s.sample_id: x.tolist() for s, x in zip(batch.samples, parts, strict=True)}
    return {key: x for rank in gather_objects(own) for key, x in rank.items()}


def with_reference(
    groups: Sequence[Sequence[Sample]],
    settings: TrainerConfig,
    trainer: MegatronTrainer,
    temperature: float,
) -> list[list[Sample]]:
    """Return the samples with the log-probs of the trainer's reference, the same on every rank."""
    samples = [sample for group in groups for sample in group]
    batches = own_micro_batches(samples, settings, trainer, temperature)
    logprobs = rows_by_sample(batches, trainer.logprobs(batches, reference=True))
    return [
        [replace(s, ref_logprobs=s.in_place(logprobs[s.sample_id], "ref_logprobs")) for s in group]
        for group in groups
    ]
