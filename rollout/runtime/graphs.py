"""CUDA graphs of decode steps: one launch a step, whatever the model's depth.

A graph serves up to `bucket` sequences with contexts up to a bound; both are rounded up, so that
few graphs serve all steps, and each is captured when it is first needed. The host sends one small
array a step; tokens and the page table stay on the device.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from samebit.kernels.sample import draw_with_logprobs
from samebit.rollout.models.decoder import Decoder
from samebit.rollout.runtime.batch import Batch, Draws, decode_draws, keep_tokens, to_device
from samebit.rollout.runtime.forward import forward
from samebit.rollout.runtime.kv_cache import KVCache
from samebit.rollout.runtime.sampler import Sampler
from samebit.rollout.runtime.scheduler import Step
from samebit.rollout.runtime.slots import Slots

logger = logging.getLogger(__name__)

BUCKETS = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512,
    640, 768, 896, 1024,
)  # fmt: skip
_MIN_CONTEXT = 1024
# Rows of a step's inputs: slot, position, page of the position, seed, sample id, bits of the
# temperature, greedy.
_NUM_INPUTS = 7


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    step: Callable[[], Any]  # owns tensors that the graph knows by address alone
    token_ids: torch.Tensor  # [bucket] int64
    logprobs: torch.Tensor  # [bucket] fp32
    hidden: torch.Tensor  # [bucket, D], where the draw is not part of the graph


class DecodeGraphs:
    """Graphs by (bucket, context bound, whether tokens are drawn in the graph).

    last_tokens [num_slots + 1] int64: the newest token of every slot, on the device.
    """

    def __init__(self, model: Decoder, cache: KVCache, last_tokens: torch.Tensor) -> None:
        self._model = model
        self._cache = cache
        self._last_tokens = last_tokens
        self._device = last_tokens.device
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[int, torch.Tensor] = {}  # by bucket
        self._table: torch.Tensor | None = None
        self._in_table: np.ndarray | None = None  # slots whose pages the device knows
        self.capture_s = 0.0
        self.memory_bytes = 0

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def fits(self, step: Step, slots: Slots) -> bool:
        """Whether a graph can run the step: decode only, no hidden states to return."""
        size = len(step.decode)
        return (
            not step.chunks and size <= BUCKETS[-1] and not bool(slots.collects[step.decode].any())
        )

    def forget(self, decode: np.ndarray) -> None:
        """These slots took part in a step without a graph: they may have pages unknown here."""
        if self._in_table is not None:
            self._in_table[decode] = -1

    def launch(
        self, decode: np.ndarray, slots: Slots, sampler: Sampler
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Start one decode step; (token ids [B], log-probs [B]) on the device."""
        size = len(decode)
        bucket = next(b for b in BUCKETS if b >= size)
        longest = int(slots.length[decode].max())
        bound = _MIN_CONTEXT
        while bound < longest:
            bound *= 2
        draws = decode_draws(decode, slots)
        self._send(decode, slots, draws, bucket)
        key = (bucket, bound, not draws.restricted)
        if key not in self._graphs:
            self._graphs[key] = self._capture(bucket, bound, draws=key[2])
        found = self._graphs[key]
        found.graph.replay()
        if not draws.restricted:
            return found.token_ids[:size], found.logprobs[:size]
        token_ids, logprobs = sampler.draw(found.hidden[:size], self._model.logits, draws)
        keep_tokens(self._last_tokens, token_ids, draws)
        return token_ids, logprobs

    def _send(self, decode: np.ndarray, slots: Slots, draws: Draws, bucket: int) -> None:
        """Give the device the step's inputs, and pages of sequences that it does not know yet."""
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
        inputs = np.zeros((_NUM_INPUTS, bucket), dtype=np.int64)
        inputs[0] = slots.num_slots  # what only fills the bucket up
        inputs[0, :size] = decode
        inputs[1, :size] = positions
        inputs[2, :size] = slots.pages[decode, positions // slots.page_size]
        inputs[3, :size] = draws.seeds
        inputs[4, :size] = draws.sample_ids
        inputs[5] = np.float32(1).view(np.int32)
        inputs[5, :size] = draws.temperatures.view(np.int32)
        inputs[6, :size] = draws.greedy
        if bucket not in self._inputs:
            self._inputs[bucket] = to_device(inputs, device)
        else:
            self._inputs[bucket].copy_(torch.from_numpy(inputs).pin_memory(), non_blocking=True)

    def _capture(self, bucket: int, bound: int, draws: bool) -> _Graph:
        """Capture a step for `bucket` sequences of at most `bound` tokens."""
        start, reserved = time.perf_counter(), torch.cuda.memory_reserved(self._device)
        step = self._make_step(bucket, bound, draws)
        saved = self._last_tokens.clone()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()  # compiles and allocates what is lazy; writes only what the replay writes again
        stream.synchronize()
        self._last_tokens.copy_(saved)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            token_ids, logprobs, hidden = step()
        self.capture_s += time.perf_counter() - start
        self.memory_bytes += torch.cuda.memory_reserved(self._device) - reserved
        logger.debug(
            "graph for %d sequences of at most %d tokens; %d graphs so far took %.1f s and %d MiB",
            bucket, bound, self.num_graphs + 1, self.capture_s, self.memory_bytes >> 20,
        )  # fmt: skip
        return _Graph(graph, step, token_ids, logprobs, hidden)

    def _make_step(self, bucket: int, bound: int, draws: bool) -> Callable[[], Any]:
        from samebit.kernels.gpu.attention import decode_plan
        from samebit.kernels.gpu.fused import decode_inputs

        model, cache, last_tokens = self._model, self._cache, self._last_tokens
        inputs, table, page_size = self._inputs[bucket], self._table, cache.page_size
        assert table is not None
        plan = decode_plan(table, page_size, bucket, min(bound, table.shape[1] * page_size))

        def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            made = decode_inputs(inputs, last_tokens, table, page_size, plan)
            batch = Batch(made.input_ids, made.positions, made.slots, plan)
            hidden, _ = forward(model, cache, batch, set())
            none = hidden[:0]
            if not draws:
                return none, none, hidden
            token_ids, logprobs = draw_with_logprobs(
                model.logits(hidden), made.temperatures, inputs[3], made.next_positions,
                inputs[4], made.greedy,
            )  # fmt: skip
            last_tokens.index_copy_(0, inputs[0], token_ids)
            return token_ids, logprobs, none

        return step
