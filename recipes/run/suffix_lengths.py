"""What the suffix drafter would have been worth, from samples that the target drew by itself.

Its guesses are looked up behind every token where an engine without adaptive drafts would have
asked for them. What is right is known, so that nothing is drawn.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.speculative.proposer import Context, ProposerParts
from samebit.rollout.speculative.suffix import Suffix
from samebit.rollout.types import Request, SamplingParams


@dataclass
class _Drawing:
    """A sample as far as it is drawn."""

    sample: RunningSample
    token_ids: np.ndarray  # [L] int32, all that it comes to
    limit: int  # tokens that it could have come to
    length: int

    def context(self, num_guesses: int) -> Context:
        """What is asked for; as in Scheduler.room_for_drafts."""
        room = min(num_guesses, self.limit - self.length - 1)
        return Context(self.sample, 0, self.token_ids[: self.length], room)

    def take(self, guesses: Sequence[int]) -> None:
        """Draw on to the first wrong guess, or by a token behind the last one."""
        behind = self.token_ids[self.length :].tolist()
        right = [guess == token for guess, token in zip(guesses, behind, strict=False)]
        accepted = (*right, False).index(False)
        self.length = min(self.length + accepted + 1, len(self.token_ids))


def suffix_accept_length(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    num_guesses: int,
    max_new_tokens: int,
) -> float | None:
    """Tokens that a step yields to a sample in the mean, behind the first one; None without a step.

    prompts [P] and completions [P][n], of at most max_new_tokens tokens, are token ids. The samples
    of a prompt are drawn beside one another, and one prompt behind another: what suffix reads in a
    step is bounded over all that are drawn. A step in which nothing is guessed yields one token,
    and counts: `Engine.accept_lengths` leaves it out.
    """
    params = SamplingParams(max_new_tokens=max_new_tokens)
    num_tokens = sum(len(tokens) - 1 for group in completions for tokens in group)
    num_steps = 0
    for prompt, group in zip(prompts, completions, strict=True):
        num_steps += _num_steps(prompt, group, params, num_guesses)
    return num_tokens / num_steps if num_steps else None


def _num_steps(
    prompt: Sequence[int],
    group: Sequence[Sequence[int]],
    params: SamplingParams,
    num_guesses: int,
) -> int:
    """Steps of all samples of a prompt together."""
    suffix = Suffix(cast(ProposerParts, None))  # it uses nothing of an engine
    ids = tuple(range(len(group)))
    request = Request(request_id="0", prompt_ids=tuple(prompt), params=params, sample_ids=ids)
    samples = RunningSample.of(request, itertools.count())
    limit = len(prompt) + params.max_new_tokens
    drawing = [
        _Drawing(sample, np.array([*prompt, *tokens], dtype=np.int32), limit, len(prompt) + 1)
        for sample, tokens in zip(samples, group, strict=True)
    ]
    num_steps = 0
    while drawing := [x for x in drawing if x.length < len(x.token_ids)]:
        contexts = [x.context(num_guesses) for x in drawing]
        for x, proposal in zip(drawing, suffix.propose(contexts), strict=True):
            x.take(proposal.token_ids)
        num_steps += len(drawing)
    return num_steps
