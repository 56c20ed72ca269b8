"""Who runs next: continuous batching under a token budget, with preemption by recompute.

Results cannot depend on any choice made here, so the choices follow speed alone. Earlier arrivals
go first; when pages run out, cached prefixes are evicted, then the latest arrival is preempted and
computes its context again later.
"""

from collections import deque
from dataclasses import dataclass

from samebit.rollout.config import EngineConfig
from samebit.rollout.runtime.kv_cache import PagePool
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.sequence import Sequence


@dataclass(frozen=True)
class Scheduled:
    """One sequence's part of a step: compute its next `num_tokens` tokens."""

    seq: Sequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the step computes the sequence's last token so far."""
        return self.num_tokens == self.seq.num_to_compute


class Scheduler:
    """Owns the queues and hands out pages."""

    def __init__(self, config: EngineConfig, pool: PagePool, prefixes: PrefixCache | None) -> None:
        self._config = config
        self._pool = pool
        self._prefixes = prefixes
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len({seq.request.request_id for seq in (*self._waiting, *self._running)})

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; its siblings come along with it."""
        self._waiting.append(seq)

    def schedule(self) -> list[Scheduled]:
        """Choose the sequences of one step and give them pages."""
        budget = self._config.max_batch_tokens
        preemptions_before = self.num_preemptions
        step: list[Scheduled] = []
        for seq in list(self._running):
            if budget == 0:
                break
            if not seq.pages:
                continue  # preempted for an earlier one
            num_tokens = min(seq.num_to_compute, self._config.prefill_chunk, budget)
            if not self._reserve(seq, seq.num_computed + num_tokens):
                continue
            step.append(Scheduled(seq, num_tokens))
            budget -= num_tokens
        if self.num_preemptions == preemptions_before:
            step += self._admit(budget)
        self._running.sort(key=lambda s: s.arrival)
        return step

    def finish(self, seq: Sequence) -> None:
        """Take a sequence off, if it got on; its full pages stay findable."""
        if seq in self._running:
            self._running.remove(seq)
            self.remember(seq)
            self._release(seq)

    def fork(self, seq: Sequence) -> list[tuple[int, int]]:
        """Start the siblings of a sequence whose prompt is computed, with their first token drawn.

        They share its full pages; returns (source, target) pages to copy for the rest. A sibling
        for which there is no room waits and computes its context itself.
        """
        copies: list[tuple[int, int]] = []
        num_full = seq.num_computed // self._config.page_size
        for sibling in seq.siblings:
            if sibling.finish_reason is not None:
                continue
            sibling.pages = list(seq.pages[:num_full])
            for page in sibling.pages:
                self._pool.share(page)
            has_room = len(self._running) < self._config.max_num_seqs
            if has_room and self._grow(sibling, seq.num_computed):
                copies += zip(seq.pages[num_full:], sibling.pages[num_full:], strict=True)
                sibling.num_computed = seq.num_computed
                sibling.hidden = {layer: list(parts) for layer, parts in seq.hidden.items()}
                self._running.append(sibling)
            else:
                self._release(sibling)
                self._requeue(sibling)
        seq.siblings = []
        return copies

    def remember(self, seq: Sequence) -> None:
        """Put the computed full pages into the prefix cache."""
        if self._prefixes is not None:
            self._prefixes.insert(seq.token_ids[: seq.num_computed], seq.pages)

    def abort(self, request_id: str) -> list[Sequence]:
        """Take all of a request's sequences off, siblings included."""
        aborted = []
        for seq in [*self._running, *self._waiting]:
            if seq.request.request_id != request_id:
                continue
            if seq in self._running:
                self._running.remove(seq)
                self._release(seq)
            else:
                self._waiting.remove(seq)
            aborted += [seq, *seq.siblings]
            seq.siblings = []
        return aborted

    def _admit(self, budget: int) -> list[Scheduled]:
        admitted = []
        while self._waiting and budget > 0 and len(self._running) < self._config.max_num_seqs:
            seq = self._waiting[0]
            if self._prefixes is not None and not self._needs_every_position(seq):
                seq.pages = self._prefixes.match(seq.token_ids)
                seq.num_computed = len(seq.pages) * self._config.page_size
            if not self._grow(seq, len(seq.token_ids)):
                self._release(seq)
                seq.restart()
                break
            num_tokens = min(seq.num_to_compute, self._config.prefill_chunk, budget)
            self._running.append(self._waiting.popleft())
            admitted.append(Scheduled(seq, num_tokens))
            budget -= num_tokens
        return admitted

    @staticmethod
    def _needs_every_position(seq: Sequence) -> bool:
        return seq.request.score_only or bool(seq.request.hidden_state_layers)

    def _reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Give seq pages for num_tokens tokens, preempting later arrivals if need be."""
        while not self._grow(seq, num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _grow(self, seq: Sequence, num_tokens: int) -> bool:
        needed = -(-num_tokens // self._config.page_size) - len(seq.pages)
        short = needed - self._pool.num_free
        if short > 0 and self._prefixes is not None:
            short -= self._prefixes.evict(short)
        if short > 0:
            return False
        seq.pages.extend(self._pool.take() for _ in range(needed))
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._release(seq)
        seq.restart()
        self._requeue(seq)
        self.num_preemptions += 1

    def _requeue(self, seq: Sequence) -> None:
        """Back into the queue, before every later arrival."""
        later = next((i for i, s in enumerate(self._waiting) if s.arrival > seq.arrival), None)
        if later is None:
            self._waiting.append(seq)
        else:
            self._waiting.insert(later, seq)

    def _release(self, seq: Sequence) -> None:
        for page in seq.pages:
            self._pool.drop(page)
        seq.pages = []
