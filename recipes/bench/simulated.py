"""Guesses that know what is to be drawn: what speculation is worth at an acceptance.

Not what a proposer is worth: these cost nothing.
"""

import random
from collections.abc import Iterator, Sequence

from samebit.rollout.speculative.proposer import Context, Proposal, Proposer

TRUTH: dict[int, tuple[int, ...]] = {}
"""By sample id, the tokens that were drawn without guesses."""
ACCEPTANCE: list[float] = []
"""One number: how likely a guess is right, if the earlier ones are."""


class Simulated(Proposer):
    """Guesses the sample's own next tokens, or others, by the token's place."""

    def propose(self, contexts: Sequence[Context]) -> list[Proposal]:
        return [Proposal(list(self._guesses(context))) for context in contexts]

    def _guesses(self, context: Context) -> Iterator[int]:
        sample, [acceptance] = context.sample, ACCEPTANCE
        start = len(context.token_ids) - len(sample.request.prompt_ids)
        for i, token in enumerate(TRUTH[sample.sample_id][start : start + context.room], start):
            right = random.Random(sample.sample_id << 32 | i).random() < acceptance
            yield token if right else (token + 1) % self.parts.vocab_size
