"""Engine steps, one planned and started while the one before still runs.

The host needs no token to plan the next step, only lengths; drawn tokens stay on the device for the
next forward and arrive here one step later. So a sequence that draws a stop token takes part in one
more step, whose result for it is dropped.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from samebit.rollout.runtime.batch import chunk_rows
from samebit.rollout.runtime.runner import Outcome, Runner
from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.runtime.sampler import Sampler, require_finite
from samebit.rollout.runtime.scheduler import Chunk, EngineStep, Scheduler
from samebit.rollout.runtime.slots import Slots
from samebit.weight_sync.types import WeightVersion


@dataclass
class _Flight:
    """A step whose results are on their way."""

    step: EngineStep
    outcome: Outcome
    positions: np.ndarray  # [B] of the tokens that the decoding sequences draw
    version: WeightVersion
    live: np.ndarray = field(init=False)  # [B] false: the sequence has ended meanwhile

    def __post_init__(self) -> None:
        self.live = np.ones(len(self.step.decode), dtype=bool)


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
        """Start one step if there is anything to do; the sequences that are newly finished.

        After an error everything begins again from the tokens that have arrived, so a call that
        raises can be repeated.
        """
        step: EngineStep | None = None
        try:
            step = self._scheduler.schedule(in_flight=bool(self._flights))
            if step is None or step.num_tokens == 0:
                return self._take_in(keep=0)
            self._scheduler.version = version
            positions = self._slots.length[step.decode]
            outcome = self._runner.launch(step, self._slots, self._sampler)
            self._scheduler.launched(step)
            self._flights.append(_Flight(step, outcome, positions, version))
            step = None
            return self._take_in(keep=self.depth)
        except BaseException:
            self._restart(step)
            raise

    def drain(self) -> list[RunningSample]:
        """Take in every step in flight; the sequences that finished."""
        try:
            return self._take_in(keep=0)
        except BaseException:
            self._restart(None)
            raise

    def _restart(self, failed: EngineStep | None) -> None:
        lost = [flight.step for flight in self._flights] + ([failed] if failed is not None else [])
        self._flights.clear()
        self._scheduler.restart_all(lost)

    def _take_in(self, keep: int) -> list[RunningSample]:
        while len(self._flights) > keep:
            self._finished += self._take(self._flights[0])
            self._flights.popleft()
        while self._flights and not self._awaited(self._flights[0]):
            self._flights.popleft()
        finished, self._finished = self._finished, []
        return finished

    @staticmethod
    def _awaited(flight: _Flight) -> bool:
        return bool(flight.live.any()) or bool(flight.step.chunks)

    def _take(self, flight: _Flight) -> list[RunningSample]:
        """Wait for a step's results and hand them to its sequences."""
        token_ids, logprobs, scores = flight.outcome.wait()
        step, num_decode = flight.step, len(flight.step.decode)
        drawing = [seq for chunk in step.chunks for seq in chunk.drawing]
        self._require_finite(flight, logprobs, scores, drawing)
        self.num_drawn += int(flight.live.sum()) + len(drawing)
        finished = self._take_decoded(flight, token_ids[:num_decode], logprobs[:num_decode])
        scores_left = iter(scores.tolist())
        drawn = zip(token_ids[num_decode:].tolist(), logprobs[num_decode:].tolist(), strict=True)
        for chunk, rows in chunk_rows(step):
            chunk.seq.add_hidden(flight.outcome.collected, rows)
            if chunk.scores:
                chunk.seq.logprobs += [next(scores_left) for _ in range(chunk.num_tokens)]
                if chunk.completes:
                    chunk.seq.finish_reason = "stop"
                    finished.append(chunk.seq)
            elif chunk.completes:
                finished += self._take_drawn(chunk, [next(drawn) for _ in chunk.drawing], flight)
        for seq in finished:
            self._end(seq)
        return finished

    def _take_decoded(
        self, flight: _Flight, token_ids: np.ndarray, logprobs: np.ndarray
    ) -> list[RunningSample]:
        slots, live = self._slots, flight.live
        owners, positions = flight.step.decode[live], flight.positions[live]
        token_ids = token_ids[live]
        slots.tokens[owners, positions] = token_ids
        slots.logprobs[owners, positions] = logprobs[live]
        slots.known[owners] = positions + 1
        for layer_rows in np.flatnonzero(slots.collects[flight.step.decode] & live):
            seq = slots.seqs[flight.step.decode[layer_rows]]
            assert seq is not None
            seq.add_hidden(flight.outcome.collected, slice(layer_rows, layer_rows + 1))
        early = slots.known[owners] < slots.min_length[owners]
        stopped = self._sampler.stopped(token_ids, slots, owners) & ~early
        full = slots.known[owners] >= slots.limit[owners]
        finished = []
        for i in np.flatnonzero(stopped | full):
            seq = slots.seqs[owners[i]]
            assert seq is not None
            seq.finish_reason = "stop" if stopped[i] else "length"
            finished.append(seq)
        return finished

    def _take_drawn(
        self, chunk: Chunk, drawn: list[tuple[int, float]], flight: _Flight
    ) -> list[RunningSample]:
        """First tokens of a prompt's samples. A sample without a slot waits for its turn."""
        finished = []
        hidden = {layer: list(parts) for layer, parts in chunk.seq.hidden.items()}
        self._scheduler.remember(chunk.seq)
        for seq, (token_id, logprob) in zip(chunk.drawing, drawn, strict=True):
            seq.append([token_id], [logprob], flight.version)
            if seq is not chunk.seq:
                seq.hidden = {layer: list(parts) for layer, parts in hidden.items()}
            params = seq.request.params
            if seq.slot is not None:
                self._slots.known[seq.slot] = len(seq.token_ids)
            if (
                token_id in self._sampler.stop_ids(seq)
                and seq.num_new_tokens >= params.min_new_tokens
            ):
                seq.finish_reason = "stop"
            elif seq.num_new_tokens >= params.max_new_tokens:
                seq.finish_reason = "length"
            if seq.finish_reason is not None:
                finished.append(seq)
            elif seq.slot is None:
                self._scheduler.requeue(seq)
        return finished

    def _end(self, seq: RunningSample) -> None:
        """Take a finished sequence off; later steps in flight have nothing for it."""
        if seq.slot is not None:
            for flight in self._flights:
                flight.live &= flight.step.decode != seq.slot
        self._scheduler.finish(seq)

    def _require_finite(
        self,
        flight: _Flight,
        logprobs: np.ndarray,
        scores: np.ndarray,
        drawing: list[RunningSample],
    ) -> None:
        bad = np.isnan(logprobs)
        bad[: len(flight.live)] &= flight.live
        if bad.any() or np.isnan(scores).any():
            decoding = [self._slots.seqs[slot] for slot in flight.step.decode]
            owners = [
                *zip(decoding, flight.positions.tolist(), strict=True),
                *((seq, len(seq.token_ids)) for seq in drawing),
            ]
            require_finite(np.where(bad, logprobs, 0), owners)
            scored = [
                (chunk.seq, chunk.start + i + 1)
                for chunk in flight.step.chunks
                if chunk.scores
                for i in range(chunk.num_tokens)
            ]
            require_finite(scores, scored)
