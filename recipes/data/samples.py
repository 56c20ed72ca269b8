"""What was drawn, as what is trained on."""

from collections.abc import Sequence, Sized
from dataclasses import replace

import numpy as np

from samebit.recipes.data.conversation import Response
from samebit.rollout.types import Completion
from samebit.trainer.algorithms.base import Advantages
from samebit.trainer.types import Sample


def drawn_sample(prompt_ids: Sequence[int], completion: Completion) -> Sample:
    """Join a prompt with one of its completions, under the completion's sample id."""
    if isinstance(completion, Response):
        return _of_turns(prompt_ids, completion)
    return Sample.of_response(
        sample_id=completion.sample_id,
        token_ids=(*prompt_ids, *completion.token_ids),
        prompt_len=len(prompt_ids),
        logprobs=completion.logprobs,
        thresholds=completion.thresholds,
        version_spans=completion.version_spans,
    )


def _of_turns(prompt_ids: Sequence[int], response: Response) -> Sample:
    begin = len(prompt_ids)
    before, thresholds = [0.0] * begin, response.thresholds
    spans = (replace(span, start=begin + span.start) for span in response.version_spans)
    return Sample(
        sample_id=response.sample_id,
        token_ids=np.asarray((*prompt_ids, *response.token_ids), np.int64),
        loss_mask=np.asarray((*[False] * begin, *response.loss_mask)),
        logprobs=np.asarray((*before, *response.logprobs), np.float32),
        thresholds=np.asarray((*before, *thresholds), np.float32) if thresholds else None,
        version_spans=tuple(spans),
    )


def with_advantages(groups: Sequence[Sequence[Sample]], advantages: Advantages) -> list[Sample]:
    """Return the samples of all groups in order, each with its advantage or advantages.

    Raises ValueError unless there is one for each sample.
    """
    _require_each(groups, advantages, "advantages")
    return [
        replace(sample, advantages=np.asarray(advantage, np.float32))
        for group, values in zip(groups, advantages, strict=True)
        for sample, advantage in zip(group, values, strict=True)
    ]


def with_returns(groups: Sequence[Sequence[Sample]], returns: Advantages) -> list[list[Sample]]:
    """Return the samples, each with what the critic is to learn of its tokens.

    Raises ValueError as with_advantages does.
    """
    _require_each(groups, returns, "returns")
    return [
        [
            replace(sample, returns=np.asarray(x, np.float32))
            for sample, x in zip(*pair, strict=True)
        ]
        for pair in zip(groups, returns, strict=True)
    ]


def _require_each(groups: Sequence[Sized], values: Sequence[Sized], what: str) -> None:
    sizes, found = [len(group) for group in groups], [len(x) for x in values]
    if sizes != found:
        raise ValueError(f"{what} of {found} samples for prompts with {sizes} samples")
