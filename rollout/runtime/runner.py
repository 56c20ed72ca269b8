"""Forward steps of the model over the paged cache, started but not waited for."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.attention_kind import AttentionKind
from samebit.kernels.top_tokens import TopTokens
from samebit.kernels.transfer import to_device
from samebit.rollout.models.decoder import Decoder
from samebit.rollout.runtime.batch import Batch, keep_tokens, make_batch, make_draws, scoring_rows
from samebit.rollout.runtime.forward import forward
from samebit.rollout.runtime.graphs import DecodeGraphs
from samebit.rollout.runtime.kv_cache import KVCache
from samebit.rollout.runtime.sampler import Drawn, Sampler
from samebit.rollout.runtime.scheduler import EngineStep
from samebit.rollout.runtime.slots import Slots

_NOTHING = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class Outcome:
    """Holds what a step gives: tokens with their log-probs and thresholds, on their way to the
    host, and hidden states."""

    token_ids: Tensor | None  # [S] int64, host
    logprobs: Tensor | None  # [S] fp32, host
    scores: Tensor | None  # fp32, host
    done: torch.cuda.Event | None
    collected: dict[int, Tensor] = field(default_factory=dict)
    thresholds: Tensor | None = None  # [S] fp32, host; None: no log-prob is truncated
    rows: np.ndarray | slice | None = None  # [S] of the first two, where there are others
    top: TopTokens | None = None  # of the scores, host; None: nobody asks

    def wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """(token ids, log-probs, thresholds, scores), once they have arrived."""
        if self.done is not None:
            self.done.synchronize()
        parts = (self.token_ids, self.logprobs, self.scores)
        token_ids, logprobs, scores = (_NOTHING if p is None else p.numpy() for p in parts)
        if self.rows is not None:
            token_ids, logprobs = token_ids[self.rows], logprobs[self.rows]
        thresholds = None if self.thresholds is None else self.thresholds.numpy()
        return token_ids.astype(np.int64), logprobs, thresholds, scores


def _to_host(values: Tensor | None) -> Tensor | None:
    return None if values is None else _on_host(values)


def _on_host(values: Tensor) -> Tensor:
    """A copy on the host that is there once the stream gets to it."""
    if values.device.type == "cpu":
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(
        values, non_blocking=True
    )


class Observer(Protocol):
    """Who is shown what every forward has computed."""

    streams: tuple[int, ...]
    """Layers whose residual streams are wanted of every row."""

    def observe(self, step: EngineStep, collected: dict[int, Tensor]) -> None:
        """Take what is wanted of the streams, each [T, D] by layer, before the next forward."""


class Runner:
    """Holds model, cache and attention together, and the newest token of every slot whose steps are
    planned ahead."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        attention: AttentionKind,
        num_slots: int,
        graph_pool: tuple[int, int] | None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.attention = attention
        self.device = model.embedding.device
        # One more than there are slots: where tokens go that no slot will continue.
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=self.device)
        self.observer: Observer | None = None
        self.graph_pool = graph_pool  # None: no CUDA graphs
        self.graphs = self._new_graphs()

    def _new_graphs(self) -> DecodeGraphs | None:
        if self.graph_pool is None:
            return None
        return DecodeGraphs(
            self.model, self.cache, self.attention, self.last_tokens, self.graph_pool
        )

    def bind(self, model: Decoder) -> None:
        """Serve another model of the same shapes from now on."""
        self.model = model
        self.graphs = self._new_graphs()

    @torch.no_grad()
    def launch(self, step: EngineStep, slots: Slots, sampler: Sampler) -> Outcome:
        """Start a step: forward, draws, and the copies for prompts that fork."""
        streams = () if self.observer is None else self.observer.streams
        if self.graphs is not None and self.graphs.fits(step, slots):
            return self._replay(self.graphs, step, slots, sampler, streams)
        if self.graphs is not None:
            self.graphs.forget(step.decode)
        batch = make_batch(step, slots, self.last_tokens, self.attention)
        wanted = {layer for c in step.chunks for layer in c.seq.request.hidden_state_layers}
        wanted |= set(streams)
        for slot in step.decode[slots.collects[step.decode]]:
            wanted |= set(slots.owner(slot).request.hidden_state_layers)
        draws, logits_of = make_draws(step, slots), self.model.logits
        scored_rows, next_ids, owners = scoring_rows(step)
        rows = np.concatenate([draws.hidden_rows, scored_rows])
        all_in_order = np.array_equal(rows, np.arange(len(batch.input_ids)))
        hidden, collected = self.forward(
            batch, wanted, None if all_in_order else to_device(rows, self.device)
        )
        if self.observer is not None:
            self.observer.observe(step, collected)  # before copies are made of pages
        drawn: Drawn | None = None
        scores, top = None, None
        num_draws = len(draws.hidden_rows)
        if num_draws:
            drawn = sampler.draw(hidden[:num_draws], logits_of, draws)
            keep_tokens(self.last_tokens, drawn[0], draws)
        if owners:
            scores, top = sampler.score(hidden[num_draws:], logits_of, next_ids, owners)
        self.cache.copy_pages([copy for chunk in step.chunks for copy in chunk.copies])
        return self._outcome(drawn, scores, collected, top=top)

    def _replay(
        self,
        graphs: DecodeGraphs,
        step: EngineStep,
        slots: Slots,
        sampler: Sampler,
        streams: tuple[int, ...],
    ) -> Outcome:
        replayed = graphs.launch(step, slots, sampler, streams)
        outcome = self._outcome(replayed.drawn, None, {}, replayed.rows)
        if self.observer is not None:
            self.observer.observe(step, replayed.streams)
        return outcome

    def forward(
        self, batch: Batch, collect: set[int], rows: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        return forward(self.model, self.cache, self.attention, batch, collect, rows)

    def _outcome(
        self,
        drawn: Drawn | None,
        scores: Tensor | None,
        collected: dict[int, Tensor],
        rows: np.ndarray | slice | None = None,
        top: TopTokens | None = None,
    ) -> Outcome:
        parts = (*(drawn or (None, None, None)), scores)
        token_ids, logprobs, thresholds, scores = (_to_host(x) for x in parts)
        if top is not None:
            top = TopTokens(*(_on_host(x) for x in (top.token_ids, top.logprobs, top.rest)))
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return Outcome(token_ids, logprobs, scores, done, collected, thresholds, rows, top)
