"""CUDA graphs of decode steps: one launch a step, whatever the model's depth.

A graph serves up to `bucket` samples with contexts up to a bound; both are rounded up, so that
few graphs serve all steps, and each is captured when it is first needed. A graph reads its inputs
from host memory and writes its results there (kernels/decode_ring.py): one replay is all that a
steady step gives the GPU to do. The page table and the newest tokens stay on the device.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.attention_kind import AttentionKind, AttentionPlan, GraphEntries
from samebit.kernels.decode_ring import HostRing, RingRow
from samebit.kernels.sample import draw_with_logprobs
from samebit.kernels.shared_prefixes import SharedPrefixes
from samebit.kernels.transfer import to_device
from samebit.rollout.models.decoder import Decoder
from samebit.rollout.runtime.batch import Batch, Draws, decode_draws, keep_tokens
from samebit.rollout.runtime.forward import forward
from samebit.rollout.runtime.kv_cache import KVCache
from samebit.rollout.runtime.sampler import Drawn, Sampler
from samebit.rollout.runtime.scheduler import EngineStep
from samebit.rollout.runtime.slots import Slots

logger = logging.getLogger(__name__)

BUCKETS = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512,
    640, 768, 896, 1024,
)  # fmt: skip
_MIN_CONTEXT = 1024
_RING = 4  # more steps than are ever in flight


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    plan: AttentionPlan
    step: Callable[[], Tensor]  # owns tensors that the graph knows by address alone
    hidden: Tensor  # [bucket, D]


class DecodeGraphs:
    """Graphs by (bucket, context bound, whether they draw tokens, bound of what samples read for
    themselves: None where no prefix is shared).

    last_tokens [num_slots + 1] int64: the newest token of every slot, on the device. pool: where
    what a step computes lies; it may be released between steps, for each replay writes all that it
    reads there. What must last lies outside.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        attention: AttentionKind,
        last_tokens: Tensor,
        pool: tuple[int, int],
    ) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._last_tokens = last_tokens
        self._device = last_tokens.device
        self._graphs: dict[tuple[int, int, bool, int | None], _Graph] = {}
        self._pool: Any = pool
        self._ring = HostRing(_RING, BUCKETS[-1], self._device)
        self._entries = np.zeros(0, dtype=np.int64)  # of the samples that decoded last
        self._shared: SharedPrefixes | None = None  # by them
        self._turn = 0  # of the ring, as the next replay will find it
        self._table: Tensor | None = None
        self._in_table: np.ndarray | None = None  # slots whose pages the device knows
        self.capture_s = 0.0

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @property
    def memory_bytes(self) -> int:
        """What the graphs share."""
        segments = torch.cuda.memory_snapshot(self._pool, include_traces=False)
        return sum(segment["total_size"] for segment in segments)

    def fits(self, step: EngineStep, slots: Slots) -> bool:
        """Whether a graph can run the step: decode only, no guesses, no hidden states to return."""
        plain = not step.chunks and step.drafts is None
        fits = plain and len(step.decode) <= BUCKETS[-1]
        return fits and not bool(slots.collects[step.decode].any())

    def forget(self, decode: np.ndarray) -> None:
        """These slots took part in a step without a graph: they may have pages unknown here."""
        if self._in_table is not None:
            self._in_table[decode] = -1

    def launch(self, decode: np.ndarray, slots: Slots, sampler: Sampler) -> Drawn:
        """Start one decode step; what it draws.

        It is the host's memory, filled once the step has run; the device's for restricted draws.
        """
        size = len(decode)
        bucket = next(b for b in BUCKETS if b >= size)
        lengths = slots.length[decode]
        draws, shared = decode_draws(decode, slots), self._shared_prefixes(decode, slots)
        self._send(decode, slots, draws, bucket)
        max_own = None if shared is None else _bound(shared.longest_own(lengths))
        key = (bucket, _bound(int(lengths.max())), not draws.restricted, max_own)
        turn, ring = self._turn, self._ring

        def prepare(plan: AttentionPlan) -> None:
            # A token is drawn at the position behind its context.
            self._attention.prepare_replay(plan, draws.positions, decode, slots.pages, shared)

        if key not in self._graphs:
            self._graphs[key] = self._capture(*key, prepare)
        found = self._graphs[key]
        prepare(found.plan)
        found.graph.replay()
        self._turn = (turn + 1) % ring.size
        if not draws.restricted:
            return ring.token_ids[turn, :size], ring.logprobs[turn, :size], None
        drawn = sampler.draw(found.hidden[:size], self._model.logits, draws)
        keep_tokens(self._last_tokens, drawn[0], draws)
        return drawn

    def _shared_prefixes(self, decode: np.ndarray, slots: Slots) -> SharedPrefixes | None:
        """What the samples are to read together; looked for when others decode than before.

        A prefix that is shared lies in what was there when its samples entered their slots.
        """
        entries = slots.entry[decode]
        if not np.array_equal(entries, self._entries):
            self._entries, size = entries, self._cache.page_size
            contexts = slots.length[decode]
            tables = slots.pages[decode, : -(-int(contexts.max()) // size)]
            self._shared = self._attention.shared_prefixes(contexts, tables, size)
        return self._shared

    def _send(self, decode: np.ndarray, slots: Slots, draws: Draws, bucket: int) -> None:
        """Put the step's inputs into the ring; send pages of samples that the device lacks."""
        device = self._device
        if self._table is None or self._in_table is None:
            self._table = torch.zeros(slots.pages.shape, dtype=torch.int32, device=device)
            self._in_table = np.full(slots.num_slots, -1)
        new = decode[self._in_table[decode] != slots.entry[decode]]
        if len(new):
            rows = to_device(slots.pages[new], device)
            self._table.index_copy_(0, to_device(new, device), rows)
            self._in_table[new] = slots.entry[new]
        positions, size = slots.computed[decode], len(decode)
        inputs = self._ring.inputs[self._turn, :, :bucket].numpy()
        inputs[:, size:] = 0  # what only fills the bucket up
        inputs[RingRow.SLOT, size:] = slots.num_slots
        inputs[RingRow.SLOT, :size] = decode
        inputs[RingRow.POSITION, :size] = positions
        inputs[RingRow.PAGE, :size] = slots.pages[decode, positions // slots.page_size]
        inputs[RingRow.SEED, :size] = draws.seeds
        inputs[RingRow.SAMPLE_ID, :size] = draws.sample_ids
        inputs[RingRow.TEMPERATURE, size:] = np.float32(1).view(np.int32)
        inputs[RingRow.TEMPERATURE, :size] = draws.temperatures.view(np.int32)
        inputs[RingRow.GREEDY, :size] = draws.greedy

    def _capture(
        self,
        bucket: int,
        bound: int,
        draws: bool,
        max_own: int | None,
        prepare: Callable[[AttentionPlan], None],
    ) -> _Graph:
        """Capture a step for `bucket` samples of at most `bound` tokens.

        It runs once before, on what the ring holds: so its plan has to be prepared for that, or
        programs that count on each other would not all be there.
        """
        start = time.perf_counter()
        table, page_size = self._table, self._cache.page_size
        assert table is not None
        longest = min(bound, table.shape[1] * page_size)
        entries = GraphEntries.empty(bucket, table, page_size, longest)
        plan = self._attention.plan_graph(entries, max_own)
        prepare(plan)
        step = self._make_step(entries, plan, draws)
        saved = self._last_tokens.clone()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                step()  # compiles and allocates what is lazy; the replay writes the rest again
            stream.synchronize()
        finally:
            self._last_tokens.copy_(saved)
            self._ring.turn.fill_(self._turn)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            hidden = step()
        self.capture_s += time.perf_counter() - start
        logger.debug(
            "graph for %d samples of at most %d tokens; %d graphs so far took %.1f s",
            bucket, bound, self.num_graphs + 1, self.capture_s,
        )  # fmt: skip
        return _Graph(graph, plan, step, hidden)

    def _make_step(
        self, entries: GraphEntries, plan: AttentionPlan, draws: bool
    ) -> Callable[[], Tensor]:
        from samebit.kernels.gpu.decode_ends import decode_inputs, decode_outputs

        model, cache, attention = self._model, self._cache, self._attention
        ring, last_tokens = self._ring, self._last_tokens

        def step() -> Tensor:
            made = decode_inputs(ring, last_tokens, entries)
            batch = Batch(
                input_ids=made.input_ids,
                positions=made.positions,
                kv_slots=made.kv_slots,
                plan=plan,
            )
            hidden, _ = forward(model, cache, attention, batch, set())
            token_ids, logprobs = made.slots[:0], made.temperatures[:0]
            if draws:
                token_ids, logprobs = draw_with_logprobs(
                    model.logits(hidden), made.temperatures, made.seeds, made.next_positions,
                    made.sample_ids, made.greedy,
                )  # fmt: skip
            decode_outputs(ring, made.slots, token_ids, logprobs, last_tokens)
            return hidden

        return step


def _bound(num_tokens: int) -> int:
    """The bound for so many tokens: few there are, so that few graphs serve all steps."""
    bound = _MIN_CONTEXT
    while bound < num_tokens:
        bound *= 2
    return bound
