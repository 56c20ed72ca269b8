"""Who runs next: continuous batching under a token budget, with preemption by recompute.

Results cannot depend on any choice made here, so the choices follow speed alone. Sequences that
decode go first, then earlier arrivals; when pages run out, cached prefixes are evicted, then the
latest arrival is preempted and computes its context again later; a mixed sample, whose context
cannot be computed again, has its pages copied to host memory and back. Who shares full pages with
an earlier arrival that computes them waits for those. Steps are planned before the results of
earlier ones are known: only their lengths matter here.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from samebit.rollout.config import EngineConfig
from samebit.rollout.runtime.awaited_pages import AwaitedPages
from samebit.rollout.runtime.drafts import Drafts
from samebit.rollout.runtime.kv_cache import KVCache, PagePool
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.running_sample import RunningSample, Status
from samebit.rollout.runtime.slots import Slots

_MOST_HELD = 256  # samples that wait for others' pages while those behind them are let in


@dataclass(frozen=True)
class Chunk:
    """A part of one context to compute: tokens [start, start + num_tokens)."""

    seq: RunningSample
    start: int
    num_tokens: int
    completes: bool
    siblings: tuple[RunningSample, ...] = ()
    """Samples of the same prompt that draw their first token from its last row."""
    copies: tuple[tuple[int, int], ...] = ()
    """(source, target) pages: the unfilled page of a prompt, for each sibling that goes on."""

    @property
    def end(self) -> int:
        """Length of the context once the chunk is computed; where a token is drawn, if any is."""
        return self.start + self.num_tokens

    @property
    def drawing(self) -> tuple[RunningSample, ...]:
        """Whose next token the last row predicts."""
        return (self.seq, *self.siblings) if self.completes and not self.scores else ()

    @property
    def scores(self) -> bool:
        """Whether every row predicts a given token."""
        return self.seq.request.score_only


@dataclass(frozen=True)
class EngineStep:
    """One forward: for each slot in `decode` its newest token and what is guessed to follow, then
    the chunks."""

    decode: np.ndarray  # [B] slots
    chunks: tuple[Chunk, ...]
    drafts: Drafts | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_decode_rows + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_decode_rows(self) -> int:
        return len(self.decode) + (0 if self.drafts is None else len(self.drafts.token_ids))


class _OutOfPagesError(Exception):
    """Pages ran out while results are in flight that may free some."""


class Scheduler:
    """Owns the queues and hands out pages and slots."""

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        prefixes: PrefixCache | None,
        slots: Slots,
        cache: KVCache,
    ) -> None:
        self._config = config
        self._cache = cache
        self._pool = pool
        self._prefixes = prefixes
        self._slots = slots
        self._awaited = AwaitedPages(config.page_size)
        self._waiting: deque[RunningSample] = deque()
        self._prefilling: list[RunningSample] = []
        self.num_preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting) or self._slots.num_used > 0

    @property
    def num_unfinished(self) -> int:
        return len({seq.request.request_id for seq in (*self._waiting, *self._running())})

    @property
    def num_running(self) -> int:
        return self._slots.num_used

    def add(self, seq: RunningSample) -> None:
        """Queue a sequence; its siblings come along with it."""
        self._waiting.append(seq)

    def schedule(self, in_flight: bool = False) -> EngineStep | None:
        """Plan one step and give its sequences pages and slots.

        None: pages ran out while results are in flight; take them in first, then ask again.
        """
        preemptions_before = self.num_preemptions
        budget = self._config.max_batch_tokens
        try:
            decode = self._decode(budget, in_flight)
            budget -= len(decode)
            chunks = []
            for seq in list(self._prefilling):
                if budget > 0:
                    chunk = self._chunk(seq, budget)
                    chunks.append(chunk)
                    budget -= chunk.num_tokens
            if self.num_preemptions == preemptions_before:
                chunks += self._admit(budget)
        except _OutOfPagesError:
            return None
        return EngineStep(decode, tuple(chunks))

    def room_for_drafts(self, step: EngineStep, wanted: int) -> np.ndarray:
        """How many guesses, of those wanted, each decoding sample of the step may have; [B] int64.

        They get what is left: none that its completion has no place for, no more tokens than a step
        may have, and pages for which nobody is preempted. The pages are the samples' from here on.
        """
        slots, decode = self._slots, step.decode
        room = np.minimum(wanted, slots.limit[decode] - slots.length[decode] - 1)
        budget = self._config.max_batch_tokens - step.num_tokens
        room = np.clip(budget - (np.cumsum(room) - room), 0, room)
        ends = slots.computed[decode] + 1 + room
        for i in np.flatnonzero(ends > slots.num_pages[decode] * self._config.page_size):
            if not self._grow(slots.owner(decode[i]), int(ends[i])):
                pages = int(slots.num_pages[decode[i]])
                room[i] -= ends[i] - pages * self._config.page_size
        return room

    def launched(self, step: EngineStep) -> None:
        """The step's tokens are on their way: its sequences may be planned further."""
        self._slots.advance(step.decode)
        for chunk in step.chunks:
            self._slots.advance_to(chunk.seq, chunk.end)
            if chunk.completes:
                self._prefilling.remove(chunk.seq)
                chunk.seq.status = Status.DECODING
            for seq in chunk.drawing:
                if seq.slot is not None:
                    seq.status = Status.DECODING
                    self._slots.start_decoding(seq)

    def finish(self, seq: RunningSample, reason: str) -> None:
        """End a sample; if it runs it is taken off, and its full pages stay findable."""
        if seq.slot is not None:
            self._leave(seq)
            self.remember(seq, seq.num_computed)
            self._drop_pages(seq)
        seq.end(reason)

    def remember(self, seq: RunningSample, num_tokens: int) -> None:
        """Put the full pages of its first tokens, which are computed, into the prefix cache.

        Not those of a mixed sample: no prompt may find keys and values of other weights.
        """
        if self._prefixes is not None and not seq.is_mixed:
            self._prefixes.insert(seq.token_ids[:num_tokens], seq.pages)
            self._awaited.found(seq, num_tokens)

    def requeue(self, seq: RunningSample) -> None:
        """Back into the queue, before every later arrival, to be computed anew."""
        seq.restart()
        self._enqueue(seq)

    def _enqueue(self, seq: RunningSample) -> None:
        seq.status = Status.WAITING
        later = next((i for i, s in enumerate(self._waiting) if s.arrival > seq.arrival), None)
        if later is None:
            self._waiting.append(seq)
        else:
            self._waiting.insert(later, seq)

    def abort(self, request_id: str) -> list[RunningSample]:
        """Take all of a request's sequences off, siblings included; nothing may be in flight."""
        aborted = []
        for seq in [*self._running(), *self._waiting]:
            if seq.request.request_id != request_id:
                continue
            if seq.slot is not None:
                self._release(seq)
            else:
                self._waiting.remove(seq)
            aborted += [seq, *seq.siblings]
            seq.siblings = []
        for seq in aborted:
            seq.end("abort")
        return aborted

    def restart_all(self, lost: Iterable[EngineStep]) -> None:
        """After a failed step: forget everything computed, keep what was drawn, begin again. What
        the prefix cache has may be a part of the failure.

        lost: steps whose results will never come.
        """
        self._send_all_back()
        for chunk in (chunk for step in lost for chunk in step.chunks):
            for sibling in chunk.siblings:
                if sibling.status is Status.FORKING:
                    self.requeue(sibling)
        if self._prefixes is not None:
            self._prefixes.reset(self._prefixes.version)

    def retract_all(self) -> None:
        """Forget all keys and values, with nothing in flight; what was drawn stays."""
        self._send_all_back()
        for seq in self._waiting:
            seq.restart()

    def keep_all(self) -> None:
        """Go on under other weights, with nothing in flight: who has drawn keeps keys and values.

        Who has drawn nothing yet, or is being computed anew, begins again under the new ones.
        """
        for seq in self._running():
            if seq.status is Status.DECODING:
                seq.is_mixed = True
            else:
                self._send_back(seq)

    # -- internals -------------------------------------------------------------------------------

    def _send_all_back(self) -> None:
        for seq in self._running():
            self._send_back(seq)

    def _running(self) -> list[RunningSample]:
        seqs = [seq for seq in self._slots.seqs if seq is not None]
        return sorted(seqs, key=lambda s: s.arrival)

    def _decode(self, budget: int, in_flight: bool) -> np.ndarray:
        """The slots that decode, each with a page for its next token."""
        slots = self._slots
        decode = slots.decode_order()[:budget]
        full = slots.computed[decode] >= slots.num_pages[decode] * self._config.page_size
        if not full.any():
            return decode
        for slot in decode[full]:
            seq = slots.seqs[slot]
            if seq is not None:  # not preempted for an earlier one
                self._reserve(seq, int(slots.computed[slot]) + 1, in_flight)
        return decode[slots.decoding[decode]]

    def _chunk(self, seq: RunningSample, budget: int) -> Chunk:
        """The next tokens of a sequence that has pages for its context, and the forks after it."""
        start, left = self._slots.num_computed(seq), self._slots.num_to_compute(seq)
        num_tokens = min(left, self._config.prefill_chunk, budget)
        if num_tokens < left:
            return Chunk(seq, start, num_tokens, completes=False)
        siblings, copies = tuple(seq.siblings), self._fork(seq)
        seq.siblings = []
        return Chunk(seq, start, num_tokens, True, siblings, copies)

    def _fork(self, seq: RunningSample) -> tuple[tuple[int, int], ...]:
        """Pages and slots for the siblings that have room: the prompt's full pages are shared.

        A sibling for which there is no room, or that ends with its first token, gets none.
        """
        context_len = len(seq.token_ids)
        num_full = context_len // self._config.page_size
        copies: list[tuple[int, int]] = []
        if seq.request.params.max_new_tokens == 1:
            return ()
        for sibling in seq.siblings:
            if self._slots.num_free == 0:
                break
            sibling.pages = list(seq.pages[:num_full])
            for page in sibling.pages:
                self._pool.share(page)
            if not self._grow(sibling, context_len):
                self._drop_pages(sibling)
                break
            self._slots.enter(sibling)
            copies += zip(seq.pages[num_full:], sibling.pages[num_full:], strict=True)
        return tuple(copies)

    def _admit(self, budget: int) -> list[Chunk]:
        """Let samples in, earlier arrivals first, but for those that wait for others' pages."""
        admitted: list[Chunk] = []
        for seq in [*islice(self._waiting, self._slots.num_free + _MOST_HELD)]:
            if budget <= 0 or self._slots.num_free == 0:
                break
            if self._finds_pages(seq) and self._awaited.has_to_wait(seq):
                continue
            if not self._enter(seq):
                break
            chunk = self._chunk(seq, budget)
            admitted.append(chunk)
            budget -= chunk.num_tokens
        self._prefilling.sort(key=lambda s: s.arrival)
        return admitted

    def _finds_pages(self, seq: RunningSample) -> bool:
        """Whether a waiting sample looks for its context in the prefix cache."""
        every_position = seq.request.score_only or seq.request.hidden_state_layers
        return self._prefixes is not None and not every_position and not seq.swapped

    def _enter(self, seq: RunningSample) -> bool:
        """Give a waiting sample a slot, and pages for its context; false if there are too few."""
        if finds := self._finds_pages(seq):
            assert self._prefixes is not None
            seq.pages = self._prefixes.match(seq.token_ids)
            seq.num_computed = len(seq.pages) * self._config.page_size
        if not self._grow(seq, len(seq.token_ids)):
            self._drop_pages(seq)
            if not seq.swapped:
                seq.restart()
            return False
        if seq.swapped:
            try:
                self._cache.write_pages(seq.pages[: len(seq.swapped[0])], seq.swapped)
            except BaseException:
                self._drop_pages(seq)  # it goes on waiting
                raise
            seq.swapped = []
        self._waiting.remove(seq)
        self._slots.enter(seq)
        self._prefilling.append(seq)
        seq.status = Status.PREFILLING
        if finds:
            self._awaited.begin(seq)
        return True

    def _reserve(self, seq: RunningSample, num_tokens: int, in_flight: bool) -> None:
        """Give seq pages for num_tokens tokens, preempting later arrivals if need be."""
        while not self._grow(seq, num_tokens):
            if in_flight:
                raise _OutOfPagesError
            victim = self._running()[-1]
            (self._swap_out if victim.is_mixed else self._send_back)(victim)
            self.num_preemptions += 1
            if victim is seq:
                return

    def _grow(self, seq: RunningSample, num_tokens: int) -> bool:
        needed = -(-num_tokens // self._config.page_size) - len(seq.pages)
        short = needed - self._pool.num_free
        if short > 0 and self._prefixes is not None:
            short -= self._prefixes.evict(short)
        if short > 0:
            return False
        seq.pages.extend(self._pool.take() for _ in range(needed))
        if seq.slot is not None:
            self._slots.set_pages(seq)
        return True

    def _send_back(self, seq: RunningSample) -> None:
        """Back into the queue, with what has arrived of its tokens."""
        self._release(seq)
        self.requeue(seq)

    def _swap_out(self, seq: RunningSample) -> None:
        """Back into the queue, with what has arrived of its tokens and all keys and values."""
        self._leave(seq)
        num_pages = -(-seq.num_computed // self._config.page_size)
        seq.swapped = self._cache.read_pages(seq.pages[:num_pages])
        self._drop_pages(seq)
        self._enqueue(seq)

    def _release(self, seq: RunningSample) -> None:
        self._leave(seq)
        self._drop_pages(seq)

    def _leave(self, seq: RunningSample) -> None:
        if seq.status is Status.PREFILLING:
            self._prefilling.remove(seq)
        self._awaited.end(seq)
        self._slots.leave(seq)

    def _drop_pages(self, seq: RunningSample) -> None:
        for page in seq.pages:
            self._pool.drop(page)
        seq.pages = []
