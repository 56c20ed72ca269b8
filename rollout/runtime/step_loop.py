"""Engine steps, one planned and started while the one before still runs.

The host needs no token to plan the next step, only lengths; drawn tokens stay on the device for the
next forward and arrive here one step later. So a sample that draws a stop token takes part in one
more step, whose result for it is dropped. Where tokens are guessed, lengths are known once a step's
results are: the next one is planned behind them, and runs while callers are told of them. So is a
step that is to guess, for what was drawn is what it guesses by; one that does not overlaps.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from samebit.rollout.runtime.batch import chunk_rows
from samebit.rollout.runtime.runner import Outcome, Runner
from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.runtime.sampler import Sampler, require_finite
from samebit.rollout.runtime.scheduler import EngineStep, Scheduler
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.speculative.speculation import Speculation
from samebit.weight_sync.types import WeightVersion


@dataclass
class _Flight:
    """A step whose results are on their way, and who gets the tokens that it draws."""

    step: EngineStep
    outcome: Outcome
    owners: np.ndarray  # [S] slots: of the decode rows, then those of each chunk.drawing; -1: none
    positions: np.ndarray  # [S] of the drawn tokens in their contexts
    version: WeightVersion
    began: float  # by time.perf_counter, when it was planned
    live: np.ndarray = field(init=False)  # [S] false: behind a wrong guess, or the sample has ended

    def __post_init__(self) -> None:
        self.live = np.ones(len(self.owners), dtype=bool)


class StepLoop:
    """Plans, starts and takes in steps. depth: how many may be in flight after a call; it may be
    changed between calls. speculation: what guesses tokens, if anything does."""

    def __init__(
        self,
        scheduler: Scheduler,
        slots: Slots,
        runner: Runner,
        sampler: Sampler,
        depth: int,
        speculation: Speculation | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._slots = slots
        self._runner = runner
        self._sampler = sampler
        self._speculation = speculation
        self.depth = depth
        self._flights: deque[_Flight] = deque()
        self._finished: list[RunningSample] = []  # taken off, but not reported yet
        self.num_drawn = 0  # tokens, over the engine's life
        self._taken_in = 0.0  # when the last step was

    @torch.no_grad()
    def advance(self, version: WeightVersion) -> list[RunningSample]:
        """Start one step if there is anything to do; the samples that are newly finished.

        After an error everything begins again from the tokens that have arrived, so a call that
        raises can be repeated.
        """
        step: EngineStep | None = None
        began = time.perf_counter()
        try:
            wanted = self._wanted_guesses()
            step = self._scheduler.schedule(in_flight=bool(self._flights))
            if step is None or step.num_tokens == 0:
                return self._collect(keep=0)
            if self._speculation is not None:
                step = self._speculation.add_drafts(step, wanted, self._scheduler, self._slots)
            outcome = self._runner.launch(step, self._slots, self._sampler)
            owners, positions = self._drawn_by(step)
            self._scheduler.launched(step)
            self._flights.append(_Flight(step, outcome, owners, positions, version, began))
            step = None
            return self._collect(keep=self.depth)
        except BaseException:
            self._restart(step)
            raise

    def drain(self) -> list[RunningSample]:
        """Take in every step in flight; the samples that finished."""
        try:
            return self._collect(keep=0)
        except BaseException:
            self._restart(None)
            raise

    def _wanted_guesses(self) -> int:
        """How many guesses the next step may have for each sample. All is taken in first where it
        may have any, and what was guessed in any case: the step is planned on known lengths."""
        if self._speculation is None:
            return 0
        if any(flight.step.drafts is not None for flight in self._flights):
            self._take_in_all(keep=0)
        wanted = self._speculation.choose(self._slots)
        if wanted:
            self._take_in_all(keep=0)
        return wanted

    def _restart(self, failed: EngineStep | None) -> None:
        lost = [flight.step for flight in self._flights] + ([failed] if failed is not None else [])
        self._flights.clear()
        self._scheduler.restart_all(lost)

    def _drawn_by(self, step: EngineStep) -> tuple[np.ndarray, np.ndarray]:
        """Slots and positions [S] of the tokens that a planned step draws; see _Flight."""
        drawn = [
            (-1 if seq.slot is None else seq.slot, chunk.end)
            for chunk in step.chunks
            for seq in chunk.drawing
        ]
        owners, positions = np.array(drawn, dtype=np.int64).reshape(-1, 2).T
        decode, offsets = step.decode, np.zeros(len(step.decode), dtype=np.int64)
        if step.drafts is not None:
            decode, offsets = step.drafts.spread(decode), step.drafts.offsets
        return (
            np.concatenate([decode, owners]),
            np.concatenate([self._slots.length[decode] + offsets, positions]),
        )

    def _collect(self, keep: int) -> list[RunningSample]:
        """Take in all but the `keep` newest steps; the samples that finished."""
        self._take_in_all(keep)
        if self._speculation is not None and not self._scheduler.has_unfinished:
            self._speculation.rest()
        finished, self._finished = self._finished, []
        return finished

    def _take_in_all(self, keep: int) -> None:
        while len(self._flights) > keep:
            self._finished += self._take_in(self._flights[0])
            self._flights.popleft()
        while self._flights and not self._is_awaited(self._flights[0]):
            self._flights.popleft()

    @staticmethod
    def _is_awaited(flight: _Flight) -> bool:
        return bool(flight.live.any()) or bool(flight.step.chunks)

    def _take_in(self, flight: _Flight) -> list[RunningSample]:
        """Wait for a step's results and give them to its samples; those that end with them.

        Nothing comes in but here. A sample without a slot gets its first token and then waits for
        its turn.
        """
        token_ids, logprobs, thresholds, scores = flight.outcome.wait()
        before, self._taken_in = max(self._taken_in, flight.began), time.perf_counter()
        step, slots, collected = flight.step, self._slots, flight.outcome.collected
        num_decode = step.num_decode_rows
        reasons = self._reasons_to_end(flight, token_ids)
        self._require_finite(flight, logprobs, scores)
        self.num_drawn += int(flight.live.sum())
        # Who holds a slot, all at once: tokens drawn in decode rows or at a chunk's end.
        rows = np.flatnonzero(flight.live & (flight.owners >= 0))
        owners = flight.owners[rows]
        drawn = flight.positions[rows], token_ids[rows], logprobs[rows]
        least = None if thresholds is None else thresholds[rows]
        slots.append(owners, *drawn, flight.version, least)
        self._settle_lengths(flight, self._taken_in - before)
        own = flight.owners[:num_decode]
        for row in np.flatnonzero(slots.collects[own] & flight.live[:num_decode]):
            slots.owner(own[row]).add_hidden(collected, slice(row, row + 1))
        ended = [(slots.owner(flight.owners[i]), reasons[i]) for i in reasons if i < num_decode]
        # Chunks one by one: what else their rows gave, and samples that hold no slot.
        values, row, scored = scores.tolist(), num_decode, 0
        for chunk, part in chunk_rows(step):
            chunk.seq.add_hidden(collected, part)
            if chunk.scores:
                rows_of = slice(scored, scored := scored + chunk.num_tokens)
                chunk.seq.add_scores(values[rows_of], rows_of, flight.outcome.top)
                if chunk.completes:
                    ended.append((chunk.seq, "stop"))
            else:
                self._scheduler.remember(chunk.seq, chunk.end)
            for seq in chunk.drawing:
                if seq is not chunk.seq:
                    seq.hidden = {layer: list(parts) for layer, parts in chunk.seq.hidden.items()}
                if seq.slot is None:
                    threshold = None if thresholds is None else float(thresholds[row])
                    drawn_alone = int(token_ids[row]), float(logprobs[row])
                    seq.append(*drawn_alone, flight.version, threshold)
                    reason = self._sampler.reason_to_end(seq)
                else:
                    reason = reasons.get(row)
                if reason is not None:
                    ended.append((seq, reason))
                elif seq.slot is None:
                    self._scheduler.requeue(seq)
                row += 1
        for seq, reason in ended:
            self._end(seq, reason)
        return [seq for seq, _ in ended]

    def _reasons_to_end(self, flight: _Flight, token_ids: np.ndarray) -> dict[int, str]:
        """By row, why a sample with a slot ends there; what lies behind a wrong guess, or behind an
        end, lives no longer."""
        rows, drafts = np.flatnonzero(flight.live & (flight.owners >= 0)), flight.step.drafts
        drawn = token_ids[rows], flight.positions[rows]
        reasons = self._sampler.reasons_to_end(rows, *drawn, self._slots, flight.owners[rows])
        if drafts is not None:
            num_rows, ends = flight.step.num_decode_rows, np.zeros(len(token_ids), dtype=bool)
            ends[list(reasons)] = True
            flight.live[:num_rows] &= drafts.holding(token_ids[:num_rows], ends[:num_rows])
        return {row: reason for row, reason in reasons.items() if flight.live[row]}

    def _settle_lengths(self, flight: _Flight, seconds: float) -> None:
        """Tell how many tokens each sample got, now that it is known which guesses were right, and
        how long that took."""
        step, drafts, speculation = flight.step, flight.step.drafts, self._speculation
        if drafts is None:
            if speculation is not None and not step.chunks:
                speculation.took(len(step.decode), seconds)
            return
        counts = drafts.counts(flight.live[: step.num_decode_rows])
        self._slots.advance_more(step.decode, counts - 1)
        if speculation is not None:
            speculation.learn(drafts, counts, None if step.chunks else seconds)

    def _end(self, seq: RunningSample, reason: str) -> None:
        """Take a sample off that ends; later steps in flight have nothing for it."""
        if seq.slot is not None:
            for flight in self._flights:
                flight.live &= flight.owners != seq.slot
        self._scheduler.finish(seq, reason)

    def _require_finite(self, flight: _Flight, logprobs: np.ndarray, scores: np.ndarray) -> None:
        bad = np.isnan(logprobs) & flight.live
        if bad.any() or np.isnan(scores).any():
            chunks = flight.step.chunks
            num_decode = flight.step.num_decode_rows
            decoding = [self._slots.seqs[slot] for slot in flight.owners[:num_decode]]
            drawing = [seq for chunk in chunks for seq in chunk.drawing]
            owners = zip([*decoding, *drawing], flight.positions.tolist(), strict=True)
            require_finite(np.where(bad, logprobs, 0), list(owners))
            scored = [
                (chunk.seq, chunk.start + i + 1)
                for chunk in chunks
                if chunk.scores
                for i in range(chunk.num_tokens)
            ]
            require_finite(scores, scored)
