"""ttt_attention: causal attention to a first pass's keys and to one key of each later pass.

A draft model is trained on its own states: pass i of a training-time test runs every column t
again, on what pass i - 1 made of it. Its query sees the first pass's keys up to t, as in
`attention`, and of each pass since then, its own included, the key of column t alone. The two parts
meet by their log-sum-exps, so memory is linear in the tokens. It is trained through, and no sampled
token depends on it: its bits are no part of the contract.

Source: Li et al. 2025, arXiv 2503.01840; of the merge: Milakov and Gimelshein 2018, arXiv
1805.02867. That a causal part's gradients need only the merged output and log-sum-exp is Dao et
al. 2022, arXiv 2205.14135.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samebit.kernels.attention import attend, attend_backward
from samebit.kernels.attention_kind import AttentionPlan
from samebit.kernels.cpu import attention as cpu


def ttt_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: Sequence[tuple[Tensor, Tensor]],
    seq_lens: Sequence[int],
    scale: float,
) -> Tensor:
    """The same in plain torch, by one softmax over [L, L + passes] scores of each sequence."""
    outputs, starts = [], [0]
    group = q.shape[1] // k.shape[1]

    def heads(x: Tensor, part: slice) -> Tensor:
        return x[part].repeat_interleave(group, 1).transpose(0, 1)

    for length in seq_lens:
        part = slice(starts[-1], starts[-1] + length)
        starts.append(part.stop)
        queries = q[part].transpose(0, 1)
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = (queries @ heads(k, part).transpose(1, 2) * scale).masked_fill(
            hidden, float("-inf")
        )
        own_scores = [(queries * heads(x, part)).sum(-1, keepdim=True) * scale for x, _ in own]
        weights = torch.cat([scores, *own_scores], -1).softmax(-1)
        output = weights[..., :length] @ heads(v, part)
        for i, (_, value) in enumerate(own):
            output = output + weights[..., length + i, None] * heads(value, part)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


class _TttAttention(torch.autograd.Function):
    """own: the later passes' keys, then their values, each [T, Hkv, Dh]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float, *own: Tensor
    ) -> Tensor:
        causal, lse = attend(q, k, v, plan, scale)
        lse = _by_row(lse, q, plan)
        keys, values = own[: len(own) // 2], own[len(own) // 2 :]
        scores = _own_scores(q, keys, scale)
        total = torch.logsumexp(torch.cat([lse[..., None], scores], -1), -1)
        merged = _by_kv(causal.float() * torch.exp(lse - total)[..., None], k)
        weights = _by_kv(torch.exp(scores - total[..., None]), k)
        for i, value in enumerate(values):
            merged += weights[..., i, None] * value[:, :, None].float()
        output = merged.view(q.shape).to(q.dtype)
        ctx.save_for_backward(q, k, v, output, total, *own)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, total, *own = ctx.saved_tensors
        keys, values = own[: len(own) // 2], own[len(own) // 2 :]
        grad, scale = grad.contiguous(), ctx.scale
        lse = _as_planned(total, k, ctx.plan)
        causal_q, grad_k, grad_v = attend_backward(grad, q, k, v, output, lse, ctx.plan, scale)
        weights = _by_kv(torch.exp(_own_scores(q, keys, scale) - total[..., None]), k)
        wide, queries = _by_kv(grad.float(), k), _by_kv(q.float(), k)
        delta = (wide * _by_kv(output.float(), k)).sum(-1)
        grad_q = _by_kv(causal_q.float(), k)
        grad_keys, grad_values = [], []
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            weight = weights[..., i]
            slope = (wide * value[:, :, None].float()).sum(-1)
            slope = weight * (slope - delta) * scale
            grad_q = grad_q + slope[..., None] * key[:, :, None].float()
            grad_keys.append((slope[..., None] * queries).sum(2).to(key.dtype))
            grad_values.append((weight[..., None] * wide).sum(2).to(value.dtype))
        grad_q = grad_q.reshape(q.shape).to(q.dtype)
        return grad_q, grad_k, grad_v, None, None, *grad_keys, *grad_values


def _own_scores(q: Tensor, keys: Sequence[Tensor], scale: float) -> Tensor:
    """[T, Hq, passes] fp32: each query with its column's key of each pass."""
    queries = _by_kv(q.float(), keys[0])
    scores = [(queries * key[:, :, None].float()).sum(-1).flatten(1) * scale for key in keys]
    return torch.stack(scores, -1)


def _by_kv(x: Tensor, like: Tensor) -> Tensor:
    """[T, Hq, ...] -> [T, Hkv, Hq / Hkv, ...]."""
    return x.unflatten(1, (like.shape[1], -1))


def _by_row(lse: Tensor, q: Tensor, plan: Any) -> Tensor:
    """Log-sum-exps as the device's attention gives them -> [T, Hq]."""
    return lse.t().contiguous() if q.is_cuda else cpu.lse_of_rows(lse, q.shape[1], plan)


def _as_planned(lse: Tensor, k: Tensor, plan: Any) -> Tensor:
    """[T, Hq] -> as the device's backward takes them."""
    return lse.t().contiguous() if k.is_cuda else cpu.lse_of_tiles(lse, k.shape[1], plan)


def ttt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: Sequence[tuple[Tensor, Tensor]],
    plan: AttentionPlan,
    scale: float,
) -> Tensor:
    """Attention of a later pass's queries [T, Hq, Dh] -> [T, Hq, Dh]; all is differentiable.

    k and v [T, Hkv, Dh]: the first pass's. own: (keys, values) [T, Hkv, Dh] of each pass since
    then, the queries' own last. plan: a packed one of CanonicalAttention.
    """
    keys, values = zip(*own, strict=True)
    return _TttAttention.apply(q, k, v, plan, scale, *keys, *values)
