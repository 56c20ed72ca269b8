"""The samples of an optimizer step, as what a trainer computes."""

from collections.abc import Sequence

from samebit.trainer.config import TrainerConfig
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import MicroBatch, Sample


def own_micro_batches(
    samples: Sequence[Sample],
    settings: TrainerConfig,
    trainer: MegatronTrainer,
    temperature: float = 1.0,
) -> list[MicroBatch]:
    """Pack an optimizer step's samples; returns the micro-batches that this data rank computes.

    temperature: the rollout's. Raises ValueError as pack_samples and share_batches do.
    """
    batches = pack_samples(
        samples,
        settings.micro_batch_tokens,
        settings.loss_mean,
        temperature,
        trainer.device,
        trainer.model,
        at_least=settings.parallel.data,
    )
    return trainer.own_batches(batches)
