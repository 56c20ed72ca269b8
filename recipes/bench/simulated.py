"""Guesses that know what is to be drawn: what speculation is worth at an acceptance.

Not what a proposer is worth: these cost nothing.
"""

import random
from collections.abc import Sequence

from samebit.rollout.speculative.proposer import Context, Proposal, Proposer

GUESSES: dict[int, list[int]] = {}
"""By sample id, what is guessed in each place of a completion."""


def expect(sample_id: int, token_ids: Sequence[int], acceptance: float, vocab_size: int) -> None:
    """Have a sample's tokens guessed: acceptance is how likely one is right, by its place alone."""
    GUESSES[sample_id] = [
        token
        if random.Random(sample_id << 32 | i).random() < acceptance
        else (token + 1) % vocab_size
        for i, token in enumerate(token_ids)
    ]


class Simulated(Proposer):
    """Guesses the sample's own next tokens, or others, as `expect` was told."""

    def propose(self, contexts: Sequence[Context]) -> list[Proposal]:
        return [Proposal(self._guesses(context)) for context in contexts]

    def _guesses(self, context: Context) -> list[int]:
        sample = context.sample
        start = len(context.token_ids) - len(sample.request.prompt_ids)
        return GUESSES[sample.sample_id][start : start + context.room]
