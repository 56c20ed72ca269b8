"""CUDA graphs of decode steps: one launch a step, whatever the model's depth.

A graph serves up to `bucket` samples with contexts up to a bound and so many rows for each: one, or
several where tokens are guessed. All are rounded up, so that few graphs serve all steps, and each
is captured when it is first needed. A graph reads its inputs from host memory and writes its
results there (kernels/decode_ring.py): one replay is all that a steady step gives the GPU to do.
The page table and the newest tokens stay on the device.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from samebit.rollout.runtime.drafts import Drafts
from samebit.rollout.runtime.forward import forward
from samebit.rollout.runtime.graph_rows import BUCKETS, bucket_of, graph_rows, queries_of
from samebit.rollout.runtime.kv_cache import KVCache
from samebit.rollout.runtime.sampler import Drawn, Sampler
from samebit.rollout.runtime.scheduler import EngineStep
from samebit.rollout.runtime.slots import Slots

logger = logging.getLogger(__name__)

_MIN_CONTEXT = 1024
_RING = 4  # more steps than are ever in flight


class _Key(NamedTuple):
    """What a graph was captured for."""

    bucket: int
    queries: int  # rows of each sample, a power of two
    bound: int  # of contexts
    draws: bool  # whether it draws tokens
    max_own: int | None  # bound of what samples read for themselves; None: no prefix is shared
    streams: tuple[int, ...]  # layers whose residual streams it leaves


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    plan: AttentionPlan
    step: Callable[[], Any]  # owns tensors that the graph knows by address alone
    hidden: Tensor  # [bucket * queries, D]
    streams: dict[int, Tensor]  # [bucket * queries, D] by layer


@dataclass(frozen=True)
class Replayed:
    """What a step that was started gives."""

    drawn: Drawn
    """The host's memory, filled once the step has run; the device's for restricted draws."""
    rows: np.ndarray | slice | None
    """The rows of it that are the step's; None: all of them."""
    streams: dict[int, Tensor]
    """By layer, of the step's rows; until the next step is started."""


@dataclass(frozen=True)
class _Columns:
    """Where the R rows of a step lie among a graph's: a sample's own behind one another."""

    queries: int
    lens: np.ndarray  # [B] guesses of each sample
    owners: np.ndarray  # [R] which sample a row is of
    offsets: np.ndarray  # [R] how far behind its newest token
    places: np.ndarray  # [R]

    @classmethod
    def of(cls, num_samples: int, drafts: Drafts | None) -> "_Columns":
        """One for each sample, or as many as the most that one needs."""
        own, zeros = np.arange(num_samples), np.zeros(num_samples, dtype=np.int64)
        if drafts is None:
            return cls(1, zeros, own, zeros, own)
        queries, owners = queries_of(drafts.most), drafts.spread(own)
        places = owners * queries + drafts.offsets
        return cls(queries, drafts.lens, owners, drafts.offsets, places)


class DecodeGraphs:
    """Graphs by what they were captured for.

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
        self._graphs: dict[_Key, _Graph] = {}
        self._pool: Any = pool
        self._ring = HostRing(_RING, BUCKETS[-1], self._device)
        # Of the samples that decoded last, and of rows for each, what is shared.
        self._entries, self._queries = np.zeros(0, dtype=np.int64), 1
        self._shared: SharedPrefixes | None = None
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
        """Whether a graph can run the step: decode only, no hidden states to return."""
        size, drafts = len(step.decode), step.drafts
        most = 0 if drafts is None else drafts.most
        if step.chunks or graph_rows(size, most) is None or slots.collects[step.decode].any():
            return False
        if drafts is None:
            return True
        return most <= self.most_guesses(size, int((slots.length[step.decode] + drafts.lens).max()))

    def most_guesses(self, num_samples: int, max_context: int) -> int:
        """The most guesses of a sample that attention has graphs for, with so many samples of
        contexts up to max_context tokens."""
        if num_samples > BUCKETS[-1]:
            return 0
        bucket, bound = bucket_of(num_samples), context_bound(max_context)
        return self._attention.graph_queries(bucket, bound) - 1

    def forget(self, decode: np.ndarray) -> None:
        """These slots took part in a step without a graph: they may have pages unknown here."""
        if self._in_table is not None:
            self._in_table[decode] = -1

    def launch(
        self, step: EngineStep, slots: Slots, sampler: Sampler, streams: tuple[int, ...]
    ) -> Replayed:
        """Start one decode step that fits. streams: layers whose residual streams are wanted."""
        decode, columns = step.decode, _Columns.of(len(step.decode), step.drafts)
        lengths = slots.length[decode] + columns.lens
        draws = decode_draws(decode, slots, step.drafts)
        shared = self._shared_prefixes(decode, slots, columns.queries)
        bucket = bucket_of(len(decode))
        self._send(step, slots, draws, columns, bucket * columns.queries)
        key = _Key(
            bucket=bucket,
            queries=columns.queries,
            bound=context_bound(int(lengths.max())),
            draws=not draws.restricted,
            max_own=None if shared is None else context_bound(shared.longest_own(lengths)),
            streams=streams,
        )
        turn, ring = self._turn, self._ring

        def prepare(plan: AttentionPlan) -> None:
            self._attention.prepare_replay(plan, lengths, decode, slots.pages, shared)

        if key not in self._graphs:
            self._graphs[key] = self._capture(key, prepare)
        found = self._graphs[key]
        prepare(found.plan)
        found.graph.replay()
        self._turn = (turn + 1) % ring.size
        own = slice(len(decode))
        places: np.ndarray | slice = own
        rows: Tensor | slice = own
        if columns.queries > 1:
            places, rows = columns.places, to_device(columns.places, self._device)
        wanted = {layer: stream[rows] for layer, stream in found.streams.items()}
        if not draws.restricted:
            return Replayed((ring.token_ids[turn], ring.logprobs[turn], None), places, wanted)
        drawn = sampler.draw(found.hidden[rows], self._model.logits, draws)
        keep_tokens(self._last_tokens, drawn[0], draws)
        return Replayed(drawn, None, wanted)

    def _shared_prefixes(
        self, decode: np.ndarray, slots: Slots, queries: int
    ) -> SharedPrefixes | None:
        """What the samples are to read together; looked for when others decode than before.

        A prefix that is shared lies in what was there when its samples entered their slots.
        """
        entries = slots.entry[decode]
        if queries != self._queries or not np.array_equal(entries, self._entries):
            self._entries, self._queries, size = entries, queries, self._cache.page_size
            contexts = slots.length[decode]
            tables = slots.pages[decode, : -(-int(contexts.max()) // size)]
            self._shared = self._attention.shared_prefixes(contexts, tables, size, queries)
        return self._shared

    def _send(
        self, step: EngineStep, slots: Slots, draws: Draws, columns: _Columns, num_rows: int
    ) -> None:
        """Put the step's inputs into the ring; send pages of samples that the device lacks."""
        decode, device = step.decode, self._device
        if self._table is None or self._in_table is None:
            self._table = torch.zeros(slots.pages.shape, dtype=torch.int32, device=device)
            self._in_table = np.full(slots.num_slots, -1)
        new = decode[self._in_table[decode] != slots.entry[decode]]
        if len(new):
            rows = to_device(slots.pages[new], device)
            self._table.index_copy_(0, to_device(new, device), rows)
            self._in_table[new] = slots.entry[new]
        owners, places = decode[columns.owners], columns.places
        positions = slots.computed[owners] + columns.offsets
        inputs = self._ring.inputs[self._turn, :, :num_rows].numpy()
        inputs[:] = 0  # also what only fills up
        inputs[RingRow.SLOT] = slots.num_slots
        inputs[RingRow.TEMPERATURE] = np.float32(1).view(np.int32)
        told, newest = np.zeros((len(RingRow), len(owners)), dtype=np.int64), slots.newest(decode)
        told[RingRow.SLOT], told[RingRow.POSITION] = owners, positions
        told[RingRow.PAGE] = slots.pages[owners, positions // slots.page_size]
        told[RingRow.SEED], told[RingRow.SAMPLE_ID] = draws.seeds, draws.sample_ids
        told[RingRow.TEMPERATURE] = draws.temperatures.view(np.int32)
        told[RingRow.GREEDY] = draws.greedy
        told[RingRow.TOKEN] = 1 + (newest if step.drafts is None else step.drafts.behind(newest))
        if step.drafts is not None:
            told[RingRow.MORE, step.drafts.firsts] = columns.lens
        inputs[:, places] = told

    def _capture(self, key: _Key, prepare: Callable[[AttentionPlan], None]) -> _Graph:
        """Capture a step.

        It runs once before, on what the ring holds: so its plan has to be prepared for that, or
        programs that count on each other would not all be there.
        """
        start = time.perf_counter()
        table, page_size = self._table, self._cache.page_size
        assert table is not None
        longest = min(key.bound, table.shape[1] * page_size)
        entries = GraphEntries.empty(key.bucket, table, page_size, longest, key.queries)
        plan = self._attention.plan_graph(entries, key.max_own)
        prepare(plan)
        step = self._make_step(entries, plan, key)
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
            hidden, streams = step()
        self.capture_s += time.perf_counter() - start
        logger.debug("%s; %d graphs took %.1f s", key, self.num_graphs + 1, self.capture_s)
        return _Graph(graph, plan, step, hidden, streams)

    def _make_step(
        self, entries: GraphEntries, plan: AttentionPlan, key: _Key
    ) -> Callable[[], tuple[Tensor, dict[int, Tensor]]]:
        from samebit.kernels.gpu.decode_ends import decode_inputs, decode_outputs

        model, cache, attention = self._model, self._cache, self._attention
        ring, last_tokens = self._ring, self._last_tokens

        def step() -> tuple[Tensor, dict[int, Tensor]]:
            made = decode_inputs(ring, last_tokens, entries)
            batch = Batch(
                input_ids=made.input_ids,
                positions=made.positions,
                kv_slots=made.kv_slots,
                plan=plan,
            )
            hidden, streams = forward(model, cache, attention, batch, set(key.streams))
            token_ids, logprobs = made.slots[:0], made.temperatures[:0]
            if key.draws:
                token_ids, logprobs = draw_with_logprobs(
                    model.logits(hidden), made.temperatures, made.seeds, made.next_positions,
                    made.sample_ids, made.greedy,
                )  # fmt: skip
            decode_outputs(ring, made.slots, token_ids, logprobs, last_tokens, key.queries)
            return hidden, streams

        return step


def context_bound(num_tokens: int) -> int:
    """The bound for so many tokens: few there are, so that few graphs serve all steps."""
    bound = _MIN_CONTEXT
    while bound < num_tokens:
        bound *= 2
    return bound
