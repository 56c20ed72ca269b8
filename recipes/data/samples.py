"""What was drawn, as what is trained on."""

from collections.abc import Sequence

from samebit.rollout.types import Completion
from samebit.trainer.config import TrainerConfig
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import MicroBatch, Sample


def drawn_sample(
    prompt_ids: Sequence[int], completion: Completion, advantage: float = 0.0
) -> Sample:
    """Join a prompt with one of its completions, under the completion's sample id."""
    return Sample(
        sample_id=completion.sample_id,
        token_ids=(*prompt_ids, *completion.token_ids),
        prompt_len=len(prompt_ids),
        logprobs=completion.logprobs,
        advantage=advantage,
    )


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
