"""attention: causal attention over keys in a paged cache or in a packed batch, one result for all.

This is the canonical kind, whose contract is in docs/contract.md: an online softmax over tiles of
keys at absolute positions, in ascending order, so that a query's result depends on its own keys
alone. A value beyond the sequence's end is replaced by zero: stale memory may hold NaN.

Source of the online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867; of the backward: Dao et
al. 2022, arXiv 2205.14135.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samebit.kernels.attention_kind import AttentionKind, AttentionPlan, GraphEntries
from samebit.kernels.contract import CPU_KV_TILE, GPU_KV_SPLIT, GPU_KV_TILE
from samebit.kernels.cpu import attention as cpu
from samebit.kernels.op import Op
from samebit.kernels.shared_prefixes import SharedPrefixes


def attention_ref(q: Tensor, k: Tensor, v: Tensor, seq_lens: Sequence[int], scale: float) -> Tensor:
    """Packed causal attention in plain torch: q [T, Hq, Dh]; k, v [T, Hkv, Dh] -> [T, Hq, Dh]."""
    outputs = []
    group = q.shape[1] // k.shape[1]
    lens = list(seq_lens)
    for q_L, k_L, v_L in zip(q.split(lens), k.split(lens), v.split(lens), strict=True):
        keys, values = (x.repeat_interleave(group, 1).float() for x in (k_L, v_L))
        scores = torch.einsum("qnh,knh->nqk", q_L.float(), keys) * scale
        causal = torch.ones(len(q_L), len(q_L), dtype=torch.bool, device=q.device).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("nqk,knh->qnh", weights, values).to(q.dtype))
    return torch.cat(outputs)


attend: Op[..., tuple[Tensor, Tensor]] = Op(
    "attention", cpu=cpu.attend, cuda="samebit.kernels.gpu.attention:attend"
)
attend_backward: Op[..., tuple[Tensor, ...]] = Op(
    "attention_backward",
    cpu=cpu.attend_backward,
    cuda="samebit.kernels.gpu.attention_backward:attend_backward",
)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float
    ) -> Tensor:
        output, lse = attend(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        return *attend_backward(grad, q, k, v, output, lse, ctx.plan, ctx.scale), None, None


class CanonicalAttention(AttentionKind):
    """Tiles and splits at absolute positions, in ascending order: the contract's own attention."""

    name = "canonical"
    is_invariant = True
    replays_alone = True

    @classmethod
    def tiles(cls, device_type: str) -> tuple[int, int | None]:
        """Tokens of a key tile, and of a split where the online softmax starts anew."""
        return (GPU_KV_TILE, GPU_KV_SPLIT) if device_type == "cuda" else (CPU_KV_TILE, None)

    def plan_step(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        page_table: Tensor,
        page_size: int,
    ) -> AttentionPlan:
        """See AttentionKind."""
        if self.device.type == "cuda":
            from samebit.kernels.gpu.attention import plan
            from samebit.kernels.gpu.decode_attention import most_queries

            few, share = most_queries(self.heads.per_kv), partial(self._shared, page_size=page_size)
            place = page_table, page_size, self.device
            found = plan(query_lens, context_lens, *place, most_queries=few, share=share)
            return replace(found, reads_ahead=self.reads_ahead)
        return cpu.plan_step(query_lens, context_lens, page_table, page_size, self.heads.per_kv)

    def plan_context(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        key_starts: Sequence[int],
        num_keys: int,
    ) -> AttentionPlan:
        """See AttentionKind."""
        if self.device.type == "cuda":
            from samebit.kernels.gpu.attention import plan

            return plan(query_lens, context_lens, None, 1, self.device, key_starts, num_keys)
        return cpu.plan_context(query_lens, context_lens, key_starts, num_keys, self.heads.per_kv)

    def graph_queries(self, num_samples: int, max_context: int) -> int:
        """See AttentionKind."""
        from samebit.kernels.gpu.attention import few_queries
        from samebit.kernels.gpu.decode_attention import most_queries

        return few_queries(num_samples, max_context, most_queries(self.heads.per_kv))

    def shared_prefixes(
        self, context_lens: np.ndarray, tables: np.ndarray, page_size: int, max_queries: int = 1
    ) -> SharedPrefixes | None:
        """See AttentionKind: what spares at least least_shared_bytes in a layer."""
        queries = np.full_like(context_lens, max_queries)
        return self._shared(queries, context_lens - 1 + queries, tables, page_size)

    def _shared(
        self,
        query_lens: np.ndarray,
        context_lens: np.ndarray,
        tables: np.ndarray,
        page_size: int,
    ) -> SharedPrefixes | None:
        if self.least_shared_bytes is None or self.device.type != "cuda":
            return None
        from samebit.kernels.gpu.prefix_tasks import find_prefixes

        return find_prefixes(
            query_lens, context_lens, tables, page_size, self.heads, self.least_shared_bytes
        )

    def plan_graph(self, entries: GraphEntries, max_own: int | None = None) -> AttentionPlan:
        """See AttentionKind."""
        from samebit.kernels.gpu.attention import plan_graph

        found = plan_graph(entries, self.heads.per_kv, max_own)
        return replace(found, reads_ahead=self.reads_ahead)

    def prepare_replay(
        self,
        plan: AttentionPlan,
        context_lens: np.ndarray,
        table_rows: np.ndarray,
        page_table: np.ndarray,
        shared: SharedPrefixes | None,
    ) -> None:
        """Tell the device what is shared; programs find their entries' lengths there."""
        from samebit.kernels.gpu.attention import prepare_replay

        prepare_replay(plan, shared)

    def attend(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """See AttentionKind."""
        flat = (-1, *key_cache.shape[2:])
        keys, values = key_cache.view(flat), value_cache.view(flat)
        return attend(q, keys, values, plan, self.heads.scale)[0]

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """See AttentionKind."""
        return _PackedAttention.apply(q, k, v, plan, self.heads.scale)
