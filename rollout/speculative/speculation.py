"""Speculation: adds guesses to engine steps, and counts how many were right."""

from collections.abc import Sequence

import numpy as np

from samebit.rollout.runtime.drafts import Drafts
from samebit.rollout.runtime.scheduler import EngineStep, Scheduler
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.speculative.draft_length import FREE_ROWS, DraftLength
from samebit.rollout.speculative.proposer import Context, Proposal, Proposer, ProposerError

_LEAST_LIKELY = 0.1  # a row that is less likely to hold is not verified


class Speculation:
    """Asks a proposer for guesses before each step. adaptive: no more than will pay."""

    def __init__(self, proposer: Proposer, adaptive: bool) -> None:
        self.proposer = proposer
        self._adaptive = adaptive
        num_draft_tokens = proposer.parts.num_draft_tokens
        free_rows = FREE_ROWS[proposer.parts.runner.device.type]
        self._length = DraftLength(num_draft_tokens, adaptive, free_rows, proposer.cost)
        self.accept_lengths = AcceptLengths.none(num_draft_tokens)

    def add_drafts(self, step: EngineStep, scheduler: Scheduler, slots: Slots) -> EngineStep:
        """The step, with guesses for its decoding samples if there are any.

        Raises ProposerError for what a proposer raises, and for what cannot be verified.
        """
        if not len(step.decode):
            return step
        wanted = self._length.choose(len(step.decode))
        if not wanted and not self.proposer.streams:
            return step
        room = scheduler.room_for_drafts(step, wanted).tolist()
        contexts = [
            Context(slots.owner(slot), int(slot), slots.context(slot), most)
            for slot, most in zip(step.decode, room, strict=True)
        ]
        guesses = [
            self._guesses(proposal, context)
            for proposal, context in zip(self._propose(contexts), contexts, strict=True)
        ]
        if not any(guesses):
            return step
        lens = np.array([len(ids) for ids in guesses], dtype=np.int64)
        token_ids = np.array([i for ids in guesses for i in ids], dtype=np.int64)
        return EngineStep(step.decode, step.chunks, Drafts(lens, token_ids))

    def learn(self, drafts: Drafts, counts: np.ndarray) -> None:
        """Take in how many tokens [B] each decoding sample of a step with guesses got."""
        self.accept_lengths = self.accept_lengths.plus(drafts, counts)
        self._length.learn(drafts, counts)

    def _propose(self, contexts: Sequence[Context]) -> Sequence[Proposal]:
        try:
            found = self.proposer.propose(contexts)
        except Exception as error:
            raise ProposerError(f"{self._name} failed: {error!r}") from error
        if len(found) != len(contexts):
            raise ProposerError(
                f"{self._name} gave {len(found)} proposals for {len(contexts)} contexts"
            )
        return found

    def _guesses(self, proposal: Proposal, context: Context) -> Sequence[int]:
        """The tokens of a proposal that are worth a row."""
        token_ids, vocab_size = list(proposal.token_ids), self.proposer.parts.vocab_size
        if len(token_ids) > context.room:
            raise ProposerError(
                f"{self._name} proposed {len(token_ids)} tokens where there is room for "
                f"{context.room}"
            )
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise ProposerError(
                f"{self._name} proposed {token_ids}; the vocabulary has {vocab_size} tokens"
            )
        if proposal.confidences is None or not self._adaptive:
            return token_ids
        if len(proposal.confidences) != len(token_ids):
            raise ProposerError(
                f"{self._name} gave {len(proposal.confidences)} confidences for {len(token_ids)} "
                "tokens"
            )
        likely = np.cumprod(np.array(proposal.confidences, dtype=np.float64)) >= _LEAST_LIKELY
        return token_ids[: len(likely) if likely.all() else int(np.argmin(likely))]

    @property
    def _name(self) -> str:
        kind = type(self.proposer)
        return f"the proposer {kind.__module__}:{kind.__qualname__}"
