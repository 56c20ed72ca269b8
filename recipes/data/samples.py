"""What was drawn, as what is trained on."""

from collections.abc import Sequence

from samebit.rollout.types import Completion
from samebit.trainer.types import Sample


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
