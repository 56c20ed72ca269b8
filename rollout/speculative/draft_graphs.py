"""CUDA graphs of a draft's chains: one launch reads what was drawn and guesses what follows.

A graph serves up to `bucket` samples with contexts up to a bound, so many new tokens of each to
read, and so many guesses behind them. What the host tells it lies in one block of pinned memory,
which it copies first; what is guessed comes back the same way, and is waited for. Where nothing is
guessed nobody waits, but for the block before it is written again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.attention_kind import GraphEntries
from samebit.rollout.runtime.batch import Layout
from samebit.rollout.runtime.graph_rows import BUCKETS, bucket_of
from samebit.rollout.runtime.graphs import context_bound
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.speculative.draft_passes import DraftPasses


class Chains(NamedTuple):
    """B samples whose new tokens are to be read, and guessed to go on."""

    slots: np.ndarray  # [B]
    lengths: np.ndarray  # [B] tokens of each context
    room: np.ndarray  # [B] guesses
    layout: Layout  # of the T tokens to read: all but the newest, from where states are held
    token_ids: np.ndarray  # [T] the token behind each


class _Key(NamedTuple):
    """What a graph was captured for."""

    bucket: int
    queries: int  # tokens of each sample to read, a power of two
    guesses: int  # of each sample
    pages: int  # of each context


class _Told:
    """What a graph is told, in int64: views of one block, in pinned memory or on the device."""

    def __init__(self, key: _Key, block: Tensor) -> None:
        rows, later = key.bucket * key.queries, max(0, key.guesses - 1)
        shapes = ((5, rows), (8, key.bucket), (later, 3, key.bucket), (key.bucket, key.pages))
        sizes = [int(np.prod(shape)) for shape in shapes]
        parts = block[: sum(sizes)].split(sizes)
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self.rows, self.samples, self.later, self.table = views

    @staticmethod
    def size(key: _Key) -> int:
        """Elements of a block."""
        rows, later = key.bucket * key.queries, max(0, key.guesses - 1)
        return 5 * rows + 8 * key.bucket + 3 * later * key.bucket + key.bucket * key.pages


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    told: _Told  # the host's
    guesses: Tensor  # [guesses, bucket] int64, the host's
    run: Callable[[], None]  # owns tensors that the graph knows by address alone
    done: torch.cuda.Event  # of the newest replay


class DraftGraphs:
    """Graphs by what they were captured for; states [slots + 1, kept, D]: see Eagle3."""

    def __init__(
        self, passes: DraftPasses, slots: Slots, states: Tensor, pool: tuple[int, int]
    ) -> None:
        self._passes, self._slots, self._states = passes, slots, states
        self._pool: Any = pool
        self._graphs: dict[_Key, _Graph] = {}

    def fits(self, chains: Chains) -> bool:
        """Whether a graph can run them."""
        if len(chains.slots) > BUCKETS[-1] or not self._passes.attention.replays_alone:
            return False
        key, bound = self._key(chains), context_bound(self._longest(chains))
        most = self._passes.attention.graph_queries(key.bucket, bound)
        return key.queries <= most and key.bucket * key.queries <= BUCKETS[-1]

    def guess(self, chains: Chains) -> np.ndarray:
        """Guesses [B, most room] of chains that fit."""
        key = self._key(chains)
        found = self._graphs.get(key)
        if found is None:
            found = self._make(key)
            self._tell(found.told, chains, key)
            self._capture(found)
            self._graphs[key] = found
        found.done.synchronize()
        self._tell(found.told, chains, key)
        found.graph.replay()
        found.done.record()
        if key.guesses:
            found.done.synchronize()
        return found.guesses.numpy()[:, : len(chains.slots)].T.copy()

    def _longest(self, chains: Chains) -> int:
        return int((chains.lengths + chains.room).max())

    def _key(self, chains: Chains) -> _Key:
        queries = 1 << (int(chains.layout.lens.max()) - 1).bit_length()
        pages = -(-context_bound(self._longest(chains)) // self._slots.page_size)
        pages = min(pages, self._slots.pages.shape[1])
        return _Key(bucket_of(len(chains.slots)), queries, int(chains.room.max()), pages)

    def _tell(self, told: _Told, chains: Chains, key: _Key) -> None:
        """Write what the graph is to compute; what only fills it up has no slot and no context."""
        slots, layout, size = self._slots, chains.layout, len(chains.slots)
        rows, samples, later = (x.numpy() for x in (told.rows, told.samples, told.later))
        starts = np.cumsum(layout.lens) - layout.lens
        owner = np.repeat(np.arange(size), layout.lens)
        places = owner * key.queries + np.arange(len(owner)) - starts[owner]
        rows[:] = 0
        rows[0], rows[4] = slots.num_slots, -1
        rows[:, places] = (
            chains.slots[owner], layout.positions % self._states.shape[1], chains.token_ids,
            layout.positions, layout.kv_slots,
        )  # fmt: skip
        samples[:] = 0
        samples[3] = np.float32(1).view(np.int32)
        own = chains.slots
        samples[:, :size] = (
            layout.starts + layout.lens, layout.lens,
            np.arange(size) * key.queries + layout.lens - 1,
            slots.temperature[own].view(np.int32), slots.seed[own], chains.lengths,
            slots.sample_id[own], slots.greedy[own],
        )  # fmt: skip
        later[:], later[:, 1] = 0, -1
        table = told.table.numpy()
        table[:size] = slots.pages[own, : key.pages]
        for i in range(1, key.guesses):
            going = chains.room > i
            positions = np.where(going, chains.lengths - 2 + i, 0)
            pages = table[np.arange(size), positions // slots.page_size]
            kv_slots = pages * slots.page_size + positions % slots.page_size
            later[i - 1, :, :size] = np.where(
                going, (positions, kv_slots, positions + 1), ((0,), (-1,), (0,))
            )

    def _make(self, key: _Key) -> _Graph:
        """A graph that is not captured yet, with the memory that it reads and writes."""
        passes, states, device = self._passes, self._states, self._states.device
        block = torch.zeros(_Told.size(key), dtype=torch.int64, pin_memory=True)
        copied = torch.zeros_like(block, device=device, pin_memory=False)
        told = _Told(key, copied)
        table = torch.zeros(key.bucket, key.pages, dtype=torch.int32, device=device)
        bound = key.pages * self._slots.page_size
        of = (key.bucket, table, self._slots.page_size, bound)
        reading, going = GraphEntries.empty(*of, key.queries), GraphEntries.empty(*of)
        for entries in (reading, going):
            entries.table_rows.copy_(torch.arange(key.bucket))
        plans = [passes.attention.plan_graph(entries) for entries in (reading, going)]
        found = torch.zeros(key.guesses, key.bucket, dtype=torch.int64, device=device)
        guesses = torch.zeros(key.guesses, key.bucket, dtype=torch.int64, pin_memory=True)

        def run() -> None:
            copied.copy_(block, non_blocking=True)
            table.copy_(told.table)
            context, query_lens, last, bits, seeds, lengths, ids, greedy = told.samples
            reading.context_lens.copy_(context)
            reading.query_lens.copy_(query_lens)
            slots, kept, token_ids, positions, kv_slots = told.rows
            held = states[slots, kept]
            fed, final = passes.step(held, token_ids, positions, kv_slots, plans[0])
            if not key.guesses:
                return
            fed, final = fed[last], final[last]
            temperature = bits.int().view(torch.float32)
            for i in range(key.guesses):
                if i:
                    positions, kv_slots, context = told.later[i - 1]
                    going.context_lens.copy_(context)
                    fed, final = passes.step(fed, found[i - 1], positions, kv_slots, plans[1])
                keys = seeds, lengths + i, ids, greedy != 0
                found[i].copy_(passes.choose(final, temperature, *keys))
            guesses.copy_(found, non_blocking=True)

        return _Graph(torch.cuda.CUDAGraph(), _Told(key, block), guesses, run, torch.cuda.Event())

    def _capture(self, made: _Graph) -> None:
        """Run it once, on what it has been told, and capture it."""
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            made.run()  # compiles and allocates what is lazy
        stream.synchronize()
        with torch.cuda.graph(
            made.graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            made.run()
