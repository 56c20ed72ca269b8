"""Who runs next: continuous batching under a token budget, with preemption by recompute.

Results cannot depend on any choice made here, so the choices follow speed alone. Earlier arrivals
go first; when pages run out, cached prefixes are evicted, then the latest arrival is preempted and
computes its context again later.
"""

from collections import deque
from dataclasses import dataclass, field

from samebit.rollout.config import EngineConfig
from samebit.rollout.runtime.kv_cache import PagePool
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.sequence import Sequence


@dataclass(frozen=True)
class Scheduled:
    """One sequence's part of a step: compute its next `num_tokens` tokens.

    `forks` are samples of the same prompt that start from this step's result. They share the full
    pages; (source, target) pairs in `page_copies` are to be copied after the forward.
    """

    seq: Sequence
    num_tokens: int
    forks: list[Sequence] = field(default_factory=list)
    page_copies: list[tuple[int, int]] = field(default_factory=list)

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
        for item in step:
            self._fork(item)
        self._running.sort(key=lambda s: s.arrival)
        return step

    def finish(self, seq: Sequence) -> None:
        """Take a sequence off; its full pages stay findable."""
        self._running.remove(seq)
        self.remember(seq)
        self._release(seq)

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

    def _fork(self, item: Scheduled) -> None:
        """Start the siblings of a sequence whose prompt this step completes."""
        if not (item.seq.siblings and item.completes):
            return
        computed = item.seq.num_computed + item.num_tokens
        num_full = computed // self._config.page_size
        for sibling in item.seq.siblings:
            has_room = len(self._running) < self._config.max_num_seqs
            sibling.pages = list(item.seq.pages[:num_full])
            for page in sibling.pages:
                self._pool.share(page)
            if has_room and self._grow(sibling, computed):
                item.page_copies.extend(
                    zip(item.seq.pages[num_full:], sibling.pages[num_full:], strict=True)
                )
                sibling.num_computed = computed
                self._running.append(sibling)
                item.forks.append(sibling)
            else:
                self._release(sibling)
                self._requeue(sibling)
        item.seq.siblings = []

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
