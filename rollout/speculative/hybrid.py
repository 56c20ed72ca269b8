"""Hybrid: for each sample whichever guesses longer, suffix or the draft model.

The draft guesses as many tokens as there is room for. Suffix does so where it has matched more
tokens than that, at least _LEAST of them drawn by the sample itself, and knows as many that follow:
a match is as long as it is to be trusted. Elsewhere the draft guesses, and suffix's shorter guess
stands in where the draft has none.
"""

from collections.abc import Sequence

from torch import Tensor

from samebit.rollout.runtime.scheduler import EngineStep
from samebit.rollout.speculative.eagle3 import Eagle3
from samebit.rollout.speculative.proposer import Context, Proposal, Proposer, ProposerParts
from samebit.rollout.speculative.suffix import Suffix

_LEAST = 4  # tokens of a match that is no chance


class Hybrid(Proposer):
    """Asks suffix for every sample, and the draft model for those where that guesses longer."""

    takes_draft = True

    def __init__(self, parts: ProposerParts) -> None:
        super().__init__(parts)
        self.suffix, self.eagle3 = Suffix(parts), Eagle3(parts)
        self.streams = self.eagle3.streams
        self.cost, self.round_cost = self.eagle3.cost, self.eagle3.round_cost

    def propose(self, contexts: Sequence[Context]) -> list[Proposal]:
        matches = self.suffix.matches(contexts)
        longer = [_is_longer(*match, c) for match, c in zip(matches, contexts, strict=True)]
        # Also of those that it need not guess for, the draft has to read what was drawn.
        asked = [
            context._replace(room=0) if found else context
            for context, found in zip(contexts, longer, strict=True)
        ]
        drafted = self.eagle3.propose(asked)
        return [
            draft if draft.token_ids else Proposal(token_ids)
            for draft, (token_ids, _) in zip(drafted, matches, strict=True)
        ]

    def rest(self) -> None:
        """See Proposer."""
        self.suffix.rest()

    def observe(self, step: EngineStep, collected: dict[int, Tensor]) -> None:
        self.eagle3.observe(step, collected)


def _is_longer(token_ids: Sequence[int], length: int, context: Context) -> bool:
    """Whether a match of this length, followed by these tokens, guesses longer than the draft."""
    # Samples of a prompt share its end: that is no sign that they go on alike.
    drawn = len(context.token_ids) - context.sample.prompt_len
    return len(token_ids) == context.room < length and min(length, drawn) >= _LEAST
