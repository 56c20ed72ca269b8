"""Gradients of packed attention on the GPU: torch's flash-attention backward, deterministic.

It is fed with our own output and log-sum-exp. Source: Dao 2023, arXiv 2307.08691.
"""

import torch
from torch import Tensor

from samebit.kernels.deterministic import deterministic
from samebit.kernels.gpu.attention import GpuAttentionPlan
from samebit.kernels.gpu.card import num_sms


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    plan: GpuAttentionPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, Hq, Dh], k and v [keys, Hkv, Dh]; lse [Hq, T], output: the forward's.

    A part of a sequence has the keys of its whole context: causal from their end, as in the kernel.
    """
    num_heads, num_kv = q.shape[1], k.shape[1]
    num_keys, spread = len(k), plan.spread_keys
    if spread is not None:
        k, v = k[spread.rows], v[spread.rows]
    heads = _filling_heads(num_heads, len(plan.seq_lens), num_sms(q.device))
    if heads > num_heads:
        grad, q, output = (_more_heads(x, heads) for x in (grad, q, output))
        k, v = (_one_per_head(x, num_heads, heads) for x in (k, v))
        lse = torch.cat([lse, lse[: heads - num_heads]])
    key_boundaries = plan.boundaries if spread is None else spread.boundaries
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)
    with deterministic():
        grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), output, lse,
            plan.boundaries, key_boundaries, max(plan.seq_lens), max(plan.key_lens), 0.0, True,
            unused, torch.empty(0, dtype=torch.uint64, device=q.device), scale=scale,
        )  # fmt: skip
    if heads > num_heads:
        parts = (x[:, :num_heads].unflatten(1, (num_kv, -1)) for x in (grad_k, grad_v))
        grad_q, (grad_k, grad_v) = grad_q[:, :num_heads], (x.sum(2) for x in parts)
    if spread is not None:
        grad_k, grad_v = (spread.summed(x, num_keys) for x in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


def _more_heads(x: Tensor, heads: int) -> Tensor:
    """[T, Hq, Dh] -> [T, heads, Dh]: the first ones again, whose results nobody reads."""
    return torch.cat([x, x[:, : heads - x.shape[1]]], dim=1)


def _one_per_head(x: Tensor, num_heads: int, heads: int) -> Tensor:
    """Keys or values [T, Hkv, Dh] -> [T, heads, Dh], in the order of `_more_heads`."""
    num_tokens, num_kv, head_dim = x.shape
    group = num_heads // num_kv
    spread = x.new_empty(num_tokens, heads, head_dim)
    spread[:, :num_heads].unflatten(1, (num_kv, group)).copy_(x[:, :, None])
    spread[:, num_heads:] = spread[:, : heads - num_heads]
    return spread


def _filling_heads(num_heads: int, num_seqs: int, sms: int) -> int:
    """The number of heads, some of them twice, with which torch's deterministic way is fastest.

    It starts s = ceil(SMs / (heads x sequences)) programs for each head of each sequence, each with
    a part of the keys, and an SM holds one program. 32 heads of one sequence make 160 programs,
    which take 132 SMs two rounds; 33 make 132.
    """

    def rounds(heads: int) -> float:
        splits = -(-sms // (heads * num_seqs))
        return -(-heads * num_seqs * splits // sms) / splits

    return min(range(num_heads, num_heads + num_heads // 4 + 1), key=rounds)
