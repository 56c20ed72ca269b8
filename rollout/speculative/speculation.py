"""Speculation: adds guesses to engine steps, and counts how many were right."""

import itertools
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
        room = scheduler.room_for_drafts(step, wanted)
        seqs, token_ids = slots.contexts(step.decode)
        columns = seqs, step.decode.tolist(), token_ids, room.tolist()
        proposals = self._propose([*map(Context, *columns)])
        drafts = self._drafts([self._guesses(proposal) for proposal in proposals], room)
        if not len(drafts.token_ids):
            return step
        return EngineStep(step.decode, step.chunks, drafts)

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

    def _drafts(self, guesses: Sequence[Sequence[int]], room: np.ndarray) -> Drafts:
        """The guesses of each sample, as a step has them."""
        lens = np.fromiter(map(len, guesses), np.int64, len(guesses))
        every = itertools.chain.from_iterable(guesses)
        try:
            token_ids = np.fromiter(every, np.int64, int(lens.sum()))
        except (TypeError, ValueError, OverflowError) as error:
            raise ProposerError(f"{self._name} proposed what is no token: {error}") from error
        if (lens > room).any():
            first = int(np.argmax(lens > room))
            raise ProposerError(
                f"{self._name} proposed {lens[first]} tokens where there is room for {room[first]}"
            )
        vocab_size = self.proposer.parts.vocab_size
        known = (token_ids >= 0) & (token_ids < vocab_size)
        if not known.all():
            first = int(np.searchsorted(np.cumsum(lens), np.argmin(known), side="right"))
            raise ProposerError(
                f"{self._name} proposed {list(guesses[first])}; the vocabulary has {vocab_size} "
                "tokens"
            )
        return Drafts(lens, token_ids)

    def _guesses(self, proposal: Proposal) -> Sequence[int]:
        """The tokens of a proposal that are worth a row."""
        token_ids = proposal.token_ids
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
