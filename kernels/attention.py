"""attention: causal attention over keys in a paged cache or in a packed batch, one result for all.

Contract: keys are taken in tiles of a fixed number of tokens at absolute positions, in ascending
order, by an online softmax (running max, sum and accumulator; each tile rescales the earlier ones).
On a GPU it starts anew at every split, and the splits merge in ascending order. A query's result
depends on its own keys alone: decode, chunked prefill and the packed training forward are the same
operations on the same tiles. Keys a query may not see get a score of -inf; a value beyond the
sequence's end is replaced by zero before the product (stale memory may hold NaN).

Source of the online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867; of the backward: Dao et
al. 2022, arXiv 2205.14135.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from samebit.kernels.cpu import attention as cpu
from samebit.kernels.op import Op


def plan_paged(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_table: torch.Tensor,
    page_size: int,
    heads_per_kv: int,
    device: torch.device | str = "cpu",
) -> Any:
    """Plan attention of queries whose keys lie in pages; only the device knows what a plan holds.

    query_lens [B]: new tokens of each sequence, the last ones of its context_lens [B] tokens
    (new ones included). page_table [B, max_pages] int64 on the CPU: page ids in order of position.
    """
    if torch.device(device).type == "cuda":
        from samebit.kernels.gpu.attention import plan

        return plan(query_lens, context_lens, page_table, page_size, torch.device(device))
    return cpu.plan_paged(query_lens, context_lens, page_table, page_size, heads_per_kv)


def plan_packed(
    seq_lens: Sequence[int], heads_per_kv: int, device: torch.device | str = "cpu"
) -> Any:
    """Plan attention of whole sequences packed one behind another, as in the training forward."""
    starts = [0, *itertools.accumulate(seq_lens)]
    return plan_context(seq_lens, seq_lens, starts[:-1], starts[-1], heads_per_kv, device)


def plan_context(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    key_starts: Sequence[int],
    num_keys: int,
    heads_per_kv: int,
    device: torch.device | str = "cpu",
) -> Any:
    """Plan attention of parts of sequences whose keys are packed, as a context parallel rank's.

    query_lens [B]: tokens of each part, the last of its context_lens [B] tokens; key_starts [B]:
    the first row of its sequence's keys among num_keys. Parts may share a sequence.
    """
    if torch.device(device).type == "cuda":
        from samebit.kernels.gpu.attention import plan

        return plan(query_lens, context_lens, None, 1, torch.device(device), key_starts, num_keys)
    return cpu.plan_context(query_lens, context_lens, key_starts, num_keys, heads_per_kv)


def attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_lens: Sequence[int], scale: float
) -> torch.Tensor:
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


_attend = Op("attention", cpu=cpu.attend, cuda="samebit.kernels.gpu.attention:attend")
_attend_backward = Op(
    "attention_backward",
    cpu=cpu.attend_backward,
    cuda="samebit.kernels.gpu.attention_backward:attend_backward",
)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Any,
        scale: float,
    ) -> torch.Tensor:
        output, lse = _attend(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        return *_attend_backward(grad, q, k, v, output, lse, ctx.plan, ctx.scale), None, None


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any, scale: float
) -> torch.Tensor:
    """Attention of packed sequences to themselves; it is differentiable.

    q [T, Hq, Dh], k and v [T, Hkv, Dh], plan from plan_packed or plan_context, scale usually
    Dh**-0.5 -> [T, Hq, Dh].
    """
    return _PackedAttention.apply(q, k, v, plan, scale)


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: Any,
    scale: float,
) -> torch.Tensor:
    """Attention of new tokens to their sequences' pages, their own keys already written.

    q [T, Hq, Dh], caches [P, page_size, Hkv, Dh], plan from plan_paged -> [T, Hq, Dh].
    """
    flat = (-1, *key_cache.shape[2:])
    return _attend(q, key_cache.view(flat), value_cache.view(flat), plan, scale)[0]
