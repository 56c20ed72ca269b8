"""Speculation: adds guesses to engine steps, and counts how many were right."""

import itertools
from collections.abc import Sequence

import numpy as np

from samebit.rollout.runtime.drafts import Drafts
from samebit.rollout.runtime.scheduler import EngineStep, Scheduler
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.speculative.draft_length import FREE_ROWS, ROUND, DraftLength, StepCost
from samebit.rollout.speculative.proposer import (
    MOST_UNREAD,
    Context,
    Proposal,
    Proposer,
    ProposerError,
)
from samebit.rollout.speculative.step_times import StepTimes

_LEAST_LIKELY = 0.1  # a row that is less likely to hold is not verified


class Speculation:
    """Asks a proposer for guesses before each step. adaptive: no more than will pay."""

    def __init__(self, proposer: Proposer, adaptive: bool) -> None:
        self.proposer = proposer
        self._adaptive = adaptive
        num_draft_tokens, self._runner = proposer.parts.num_draft_tokens, proposer.parts.runner
        cost = StepCost(
            free_rows=FREE_ROWS[self._runner.device.type],
            pads=self._runner.graphs is not None,
            draft=proposer.cost,
            round=ROUND + proposer.round_cost,
        )
        self._length = DraftLength(num_draft_tokens, adaptive, cost)
        self._unread = 0  # steps since the proposer was called
        self._times = StepTimes()
        self.accept_lengths = AcceptLengths.none(num_draft_tokens)

    def choose(self, slots: Slots) -> int:
        """The most guesses for each sample of the step that is planned next; 0: it may be planned
        while others are in flight.

        Asked before those are taken in, and by what is the same on all ranks at that moment.
        """
        if not (num_samples := int(np.count_nonzero(slots.decoding))):
            return 0
        most = None
        if (graphs := self._runner.graphs) is not None:
            longest = int(slots.length[slots.decoding].max())
            most = graphs.most_guesses(num_samples, longest + self.proposer.parts.num_draft_tokens)
        return self._length.choose(num_samples, most)

    def add_drafts(
        self, step: EngineStep, wanted: int, scheduler: Scheduler, slots: Slots
    ) -> EngineStep:
        """The step, with up to `wanted` guesses for its decoding samples if there are any.

        Raises ProposerError for what a proposer raises, and for what cannot be verified.
        """
        if not len(step.decode) or not self._has_to_call(wanted):
            return step
        room = scheduler.room_for_drafts(step, wanted)
        seqs, token_ids = slots.contexts(step.decode)
        columns = seqs, step.decode.tolist(), token_ids, room.tolist()
        proposals = self._propose([*map(Context, *columns)])
        self._unread = 0
        if not wanted or not room.any():  # as before the last token of each: nothing is learnt
            return step
        likely = self._likely(proposals)
        guesses = [proposal.token_ids for proposal in proposals]
        for i, chain in likely.items():
            guesses[i] = guesses[i][: len(chain)]
        drafts = self._drafts(guesses, room)
        num_others = step.num_tokens - len(step.decode)
        most = self._length.cut(drafts.lens, likely, num_others)
        if not most:
            if self.proposer.is_preparing:
                return step
            none = np.zeros_like(drafts.lens)
            self._length.learn(none, none + 1)
            return step
        return EngineStep(step.decode, step.chunks, drafts.cut(most))

    def learn(self, drafts: Drafts, counts: np.ndarray, seconds: float | None) -> None:
        """Take in how many tokens [B] each decoding sample of a step with guesses got, and how long
        the step took; None: it had prompts too."""
        self.accept_lengths = self.accept_lengths.plus(drafts, counts)
        self._length.learn(drafts.lens, counts)
        plain = None if seconds is None else self._times.typical(len(counts))
        if seconds is not None and plain is not None:
            saved = plain * int(counts.sum()) / len(counts)
            self.accept_lengths = self.accept_lengths.timed(seconds, saved)

    def took(self, num_samples: int, seconds: float) -> None:
        """Take in how long a step without guesses and without prompts took."""
        self._times.add(num_samples, seconds)

    def rest(self) -> None:
        """No sample is unfinished: let go of what belongs to any."""
        self.proposer.rest()

    def _has_to_call(self, wanted: int) -> bool:
        """Whether the proposer is called in this step: to guess, or to read the streams that it
        was shown."""
        self._unread += 1
        return wanted > 0 or (bool(self.proposer.streams) and self._unread >= MOST_UNREAD)

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

    def _likely(self, proposals: Sequence[Proposal]) -> dict[int, np.ndarray]:
        """By context, where a proposer says it, how likely each guess and all before it are right;
        as far as a guess is worth a row."""
        found: dict[int, np.ndarray] = {}
        for i, (token_ids, confidences) in enumerate(proposals):
            if confidences is None or not self._adaptive:
                continue
            if len(confidences) != len(token_ids):
                raise ProposerError(
                    f"{self._name} gave {len(confidences)} confidences for {len(token_ids)} tokens"
                )
            try:
                each = np.array(confidences, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise ProposerError(f"{self._name} gave no confidences: {error}") from error
            if not ((each >= 0) & (each <= 1)).all():
                raise ProposerError(
                    f"{self._name} gave confidences {list(confidences)}; each must be in [0, 1]"
                )
            chain = np.cumprod(each)
            found[i] = chain[chain >= _LEAST_LIKELY]
        return found

    @property
    def _name(self) -> str:
        kind = type(self.proposer)
        return f"the proposer {kind.__module__}:{kind.__qualname__}"
