"""Engine steps, one planned and started while the one before still runs.

The host needs no token to plan the next step, only lengths; drawn tokens stay on the device for the
next forward and arrive here one step later. So a sample that draws a stop token takes part in one
more step, whose result for it is dropped.
"""

import itertools
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
from samebit.weight_sync.types import WeightVersion


@dataclass
class _Flight:
    """A step whose results are on their way, and who gets the tokens that it draws."""

    step: EngineStep
    outcome: Outcome
    owners: np.ndarray  # [S] slots: those that decode, then those of each chunk.drawing; -1: none
    positions: np.ndarray  # [S] of the drawn tokens in their contexts
    version: WeightVersion
    live: np.ndarray = field(init=False)  # [S] false: the sample has ended meanwhile

    def __post_init__(self) -> None:
        self.live = np.ones(len(self.owners), dtype=bool)


class StepLoop:
    """Plans, starts and takes in steps. depth: how many may be in flight after a call; it may be
    changed between calls."""

    def __init__(
        self, scheduler: Scheduler, slots: Slots, runner: Runner, sampler: Sampler, depth: int
    ) -> None:
        self._scheduler = scheduler
        self._slots = slots
        self._runner = runner
        self._sampler = sampler
        self.depth = depth
        self._flights: deque[_Flight] = deque()
        self._finished: list[RunningSample] = []  # taken off, but not reported yet
        self.num_drawn = 0  # tokens, over the engine's life

    @torch.no_grad()
    def advance(self, version: WeightVersion) -> list[RunningSample]:
        """Start one step if there is anything to do; the samples that are newly finished.

        After an error everything begins again from the tokens that have arrived, so a call that
        raises can be repeated.
        """
        step: EngineStep | None = None
        try:
            step = self._scheduler.schedule(in_flight=bool(self._flights))
            if step is None or step.num_tokens == 0:
                return self._collect(keep=0)
            owners, positions = self._drawn_by(step)
            outcome = self._runner.launch(step, self._slots, self._sampler)
            self._scheduler.launched(step)
            self._flights.append(_Flight(step, outcome, owners, positions, version))
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
        return (
            np.concatenate([step.decode, owners]),
            np.concatenate([self._slots.length[step.decode], positions]),
        )

    def _collect(self, keep: int) -> list[RunningSample]:
        """Take in all but the `keep` newest steps; the samples that finished."""
        while len(self._flights) > keep:
            self._finished += self._take_in(self._flights[0])
            self._flights.popleft()
        while self._flights and not self._awaited(self._flights[0]):
            self._flights.popleft()
        finished, self._finished = self._finished, []
        return finished

    @staticmethod
    def _awaited(flight: _Flight) -> bool:
        return bool(flight.live.any()) or bool(flight.step.chunks)

    def _take_in(self, flight: _Flight) -> list[RunningSample]:
        """Wait for a step's results and give them to its samples; those that end with them.

        Nothing comes in but here. A sample without a slot gets its first token and then waits for
        its turn.
        """
        token_ids, logprobs, thresholds, scores = flight.outcome.wait()
        self._require_finite(flight, logprobs, scores)
        self.num_drawn += int(flight.live.sum())
        step, slots, collected = flight.step, self._slots, flight.outcome.collected
        num_decode = len(step.decode)
        # Who holds a slot, all at once: a token each, drawn in a decode row or at a chunk's end.
        rows = np.flatnonzero(flight.live & (flight.owners >= 0))
        owners = flight.owners[rows]
        drawn = flight.positions[rows], token_ids[rows], logprobs[rows]
        least = None if thresholds is None else thresholds[rows]
        slots.append(owners, *drawn, flight.version, least)
        reasons = self._sampler.reasons_to_end(rows, token_ids[rows], slots, owners)
        for row in np.flatnonzero(slots.collects[step.decode] & flight.live[:num_decode]):
            slots.owner(flight.owners[row]).add_hidden(collected, slice(row, row + 1))
        ended = [(slots.owner(flight.owners[i]), reasons[i]) for i in reasons if i < num_decode]
        # Chunks one by one: what else their rows gave, and samples that hold no slot.
        values, row = iter(scores.tolist()), num_decode
        for chunk, part in chunk_rows(step):
            chunk.seq.add_hidden(collected, part)
            if chunk.scores:
                chunk.seq.logprobs += itertools.islice(values, chunk.num_tokens)
                if chunk.completes:
                    ended.append((chunk.seq, "stop"))
            elif chunk.completes:
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
            decoding = [self._slots.seqs[slot] for slot in flight.step.decode]
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
