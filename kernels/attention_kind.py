"""AttentionKind: attention as engine and trainer know it, whoever computes it.

A kind plans how the work of a forward is divided, once for all layers, and attends by the plan in
each. A recipe's numerics.attention chooses one, for the engine's runner and the trainer's layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.shared_prefixes import SharedPrefixes


class Heads(NamedTuple):
    """The heads that one rank holds."""

    num_heads: int
    """Hq, query heads."""
    num_kv_heads: int
    """Hkv, KV heads."""
    head_dim: int
    """Dh."""
    scale: float
    """Factor of q @ k, usually Dh**-0.5."""

    @property
    def per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


LEAST_SHARED_BYTES = 64 << 20  # from L2, where siblings find them: as long as sharing costs


class AttentionPlan:
    """Says how one forward's work is divided. Only the kind that made it knows what it holds.

    It stays valid as long as it lives: others may be planned, and used, meanwhile.
    """


@dataclass(frozen=True)
class GraphEntries:
    """What a captured decode step knows of its samples: tensors that every replay fills anew.

    Their first kernel writes the first three before any layer attends. A sample has max_queries
    rows of the forward, of which its first query_lens count: its new tokens, the last ones of its
    context.
    """

    table_rows: Tensor
    """[B] int32, rows of the page table."""
    context_lens: Tensor
    """[B] int32, tokens of the contexts, new ones included; 0: only fills the batch up."""
    query_lens: Tensor
    """[B] int32."""
    page_table: Tensor
    """[slots, max_pages] int32, page ids in order of position."""
    page_size: int
    max_context: int
    """Bound of context_lens."""
    max_queries: int
    """A power of two."""

    @classmethod
    def empty(
        cls,
        batch: int,
        page_table: Tensor,
        page_size: int,
        max_context: int,
        max_queries: int = 1,
    ) -> "GraphEntries":
        """Entries for `batch` samples, of one query each, which only fill it up so far."""
        # Each by itself: kernels are compiled for aligned addresses.
        rows, lens = (
            torch.zeros(batch, dtype=torch.int32, device=page_table.device) for _ in range(2)
        )
        queries = torch.ones_like(rows)
        return cls(rows, lens, queries, page_table, page_size, max_context, max_queries)

    @property
    def num_rows(self) -> int:
        """Of the forward."""
        return len(self.table_rows) * self.max_queries


class AttentionKind(ABC):
    """Causal attention of given heads on one device, paged for the engine, packed for the trainer.

    Another kind is a subclass in one file and a line of kernels/registry.py: see docs/extending.md.
    """

    name: ClassVar[str]
    """What the numerics profile calls it; with a library's version, if bits depend on that."""
    is_invariant: ClassVar[bool]
    """Whether a query's bits depend on its own keys alone, so that the trainer's log-probs are the
    rollout's: that is proven at start-up and checked in every training step."""
    replays_alone: ClassVar[bool] = False
    """Whether a graph's plan finds lengths and pages on the device, where nothing is shared: it can
    be used several times in a graph, without prepare_replay."""

    def __init__(self, heads: Heads, device: torch.device) -> None:
        self.heads = heads
        self.device = device
        self.least_shared_bytes: int | None = LEAST_SHARED_BYTES
        """How much a layer must be spared before decode shares prefixes; None: it never does."""
        self.reads_ahead = True
        """Whether `attend` may read keys of earlier steps before the kernel that directly precedes
        it is done: what that one writes is an earlier key to none of the samples."""

    @classmethod  # noqa: B027 - most run anywhere
    def require_usable(cls, device_type: str) -> None:
        """Raise ValueError where the kind does not run: on another device, without its library."""

    @classmethod
    def tiles(cls, device_type: str) -> tuple[int | None, int | None]:
        """The profile's kv_tile and kv_split, for a kind whose bits have such constants."""
        return None, None

    @abstractmethod
    def plan_step(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        page_table: Tensor,
        page_size: int,
    ) -> AttentionPlan:
        """Plan an engine step, whose keys lie in pages.

        query_lens [B]: new tokens of each sample, the last ones of its context_lens [B] tokens (new
        ones included). page_table [B, max_pages] int64 on the CPU: page ids in order of position.
        Samples share a prefix where their rows begin with the same pages, and nowhere else.
        """

    def plan_packed(self, seq_lens: Sequence[int]) -> AttentionPlan:
        """Plan attention of whole samples packed one behind another, as in the training forward."""
        *starts, num_keys = accumulate(seq_lens, initial=0)
        return self.plan_context(seq_lens, seq_lens, starts, num_keys)

    @abstractmethod
    def plan_context(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        key_starts: Sequence[int],
        num_keys: int,
    ) -> AttentionPlan:
        """Plan attention of parts of samples whose keys are packed, as a context parallel rank's.

        query_lens [B]: tokens of each part, the last of its context_lens [B] tokens; key_starts
        [B]: the first row of its sample's keys among num_keys. Parts may share a sample.
        """

    def graph_queries(self, num_samples: int, max_context: int) -> int:
        """The most new tokens of a sample, a power of two, in a CUDA graph of so many samples with
        contexts up to a bound: where tokens are guessed there are several."""
        return 1

    def shared_prefixes(
        self, context_lens: np.ndarray, tables: np.ndarray, page_size: int, max_queries: int = 1
    ) -> SharedPrefixes | None:
        """What the samples of a graph's decode step are to read together, if anything.

        context_lens [B], the first new token included; tables [B, pages] int32: their pages in
        order of position; max_queries: the graph's. A kind that reads every sample's context for
        itself leaves this as it is.
        """
        return None

    @abstractmethod
    def plan_graph(self, entries: GraphEntries, max_own: int | None = None) -> AttentionPlan:
        """Plan the decode steps of a CUDA graph, each of max_queries rows for every entry.

        The plan must serve every replay: it holds what is captured, at addresses that stay.
        max_own: for steps in which shared_prefixes finds something, a bound of its longest_own;
        unset: nothing is shared.
        """

    @abstractmethod
    def prepare_replay(
        self,
        plan: AttentionPlan,
        context_lens: np.ndarray,
        table_rows: np.ndarray,
        page_table: np.ndarray,
        shared: SharedPrefixes | None,
    ) -> None:
        """Bring a graph's plan up to the step that is replayed next.

        context_lens and table_rows [size] int64: as the entries will hold them, without what only
        fills the batch up; page_table [slots, max_pages] int32; shared: what shared_prefixes found
        for them, the same object as long as they are the same samples. The step before may still
        run.
        """

    @abstractmethod
    def attend(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """Attention of new tokens to their samples' pages, their own keys already written.

        q [T, Hq, Dh], caches [P, page_size, Hkv, Dh] -> [T, Hq, Dh]; plan: of a step or a graph.
        See reads_ahead for what may have been written just before.
        """

    @abstractmethod
    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """Attention of packed samples to themselves; it is differentiable in q, k and v.

        q [T, Hq, Dh], k and v [num_keys, Hkv, Dh] -> [T, Hq, Dh]; plan: packed or of a context.
        """
