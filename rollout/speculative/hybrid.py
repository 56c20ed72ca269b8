"""Hybrid: suffix where the text repeats itself for long enough, else the draft model."""

from collections.abc import Sequence

from torch import Tensor

from samebit.rollout.runtime.scheduler import EngineStep
from samebit.rollout.speculative.eagle3 import Eagle3
from samebit.rollout.speculative.proposer import Context, Proposal, Proposer, ProposerParts
from samebit.rollout.speculative.suffix import Suffix

_LONG_ENOUGH = 6  # tokens of a match that is trusted more than a draft


class Hybrid(Proposer):
    """Asks suffix for every sample, and the draft model for those without a long match."""

    def __init__(self, parts: ProposerParts) -> None:
        super().__init__(parts)
        self.suffix, self.eagle3 = Suffix(parts), Eagle3(parts)
        self.streams, self.cost = self.eagle3.streams, self.eagle3.cost

    def propose(self, contexts: Sequence[Context]) -> list[Proposal]:
        matches = self.suffix.matches(contexts)
        trusted = [length >= _LONG_ENOUGH for _, length in matches]
        # Also of those that it need not guess for, the draft has to read what was drawn.
        asked = [
            context._replace(room=0) if trust else context
            for context, trust in zip(contexts, trusted, strict=True)
        ]
        drafted = self.eagle3.propose(asked)
        both = zip(matches, trusted, drafted, strict=True)
        return [
            match if trust or not draft.token_ids else draft for (match, _), trust, draft in both
        ]

    def observe(self, step: EngineStep, collected: dict[int, Tensor]) -> None:
        self.eagle3.observe(step, collected)
