"""A distribution by its k most likely tokens, and the reverse KL of another to it.

All other tokens are one outcome, the rest: of k + 1 outcomes KL(p || q) is the sum of p log(p / q)
over the k tokens and the rest. It is at most the KL of the whole distributions, 0 where those agree
on the k tokens, and equal where k is the vocabulary. Source: "Tail-Aware Top-k On-Policy
Distillation", arXiv 2608.14728; TRL's loss_top_k with loss_add_tail. Rows are taken in chunks, as
in logprob.py; [T, V] never exists.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from samebit.kernels.linear import add_product, linear
from samebit.kernels.logprob import logits, logsumexp, row_parts
from samebit.kernels.reduce import ALONE, RankGroup

_NEVER = float("-inf")
_MOST_KEYS = 1 << 25
"""Elements of [T, V] that are ordered at a time, 8 bytes each."""


@dataclass(frozen=True)
class TopTokens:
    """The most likely tokens of some rows, the likeliest first, equal ones by their ids."""

    token_ids: Tensor
    """[T, k] int32."""
    logprobs: Tensor
    """[T, k] fp32."""
    rest: Tensor
    """[T] fp32: the log-prob of all other tokens together; -inf where there are none."""

    @classmethod
    def joined(cls, parts: Sequence["TopTokens"]) -> Self:
        """Those of rows one behind another."""
        names = ("token_ids", "logprobs", "rest")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def select(self, rows: Tensor | slice) -> Self:
        """Those of some rows."""
        return type(self)(self.token_ids[rows], self.logprobs[rows], self.rest[rows])

    def first(self, k: int) -> Self:
        """The k likeliest of each row, of which the rest is known to be of these."""
        return type(self)(self.token_ids[:, :k], self.logprobs[:, :k], self.rest)

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return type(self)(*(x.to(device) for x in (self.token_ids, self.logprobs, self.rest)))


def top_tokens(scaled_logits: Tensor, k: int) -> TopTokens:
    """The k most likely tokens of rows of scaled_logits [T, V] fp32, 1 <= k <= V.

    Which they are, and every bit, is a function of the row alone.
    """
    step = max(1, _MOST_KEYS // scaled_logits.shape[1])
    return TopTokens.joined([_top_tokens(rows, k) for rows in scaled_logits.split(step)])


def _top_tokens(scaled_logits: Tensor, k: int) -> TopTokens:
    bits = (scaled_logits + 0.0).view(torch.int32).long()  # -0 is 0
    ordered = torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)  # as the floats are
    lower_first = torch.arange(scaled_logits.shape[1] - 1, -1, -1, device=bits.device)
    found = ordered.mul_(1 << 32).add_(lower_first).topk(k, sorted=True).indices
    normalizer = logsumexp(scaled_logits)
    chosen = scaled_logits.gather(1, found) - normalizer[:, None]
    others = scaled_logits.scatter(1, found, _NEVER)
    return TopTokens(found.int(), chosen, logsumexp(others) - normalizer)


class _ReverseKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        top: TopTokens,
        temperature: Tensor,
        vocab_size: int,
        ranks: RankGroup,
        main_grad: Tensor | None,
    ) -> Tensor:
        ctx.parts = row_parts(len(hidden), vocab_size, hidden.device)
        ctx.main_grad, ctx.weight_shape = main_grad, weight.shape
        ctx.first = ranks.rank * len(weight)  # the vocabulary's part that this rank holds
        live = max(0, min(len(weight), vocab_size - ctx.first))
        found = []
        for part in ctx.parts:
            scaled = logits(hidden[part], weight, vocab_size, ranks) / temperature[part, None]
            found.append(_outcomes(scaled, top.select(part)))
        kl, normalizer, slopes, rest_slope = (torch.cat(x) for x in zip(*found, strict=True))
        ids = top.token_ids.long()
        saved = (hidden, weight[:live], temperature, normalizer, ids, slopes, rest_slope)
        ctx.save_for_backward(*saved)
        return kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, temperature, normalizer, ids, slopes, rest_slope = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), ctx.main_grad
        if grad_weight is None:
            grad_weight = torch.zeros(ctx.weight_shape, device=weight.device)
        live = len(weight)
        for part in ctx.parts if len(hidden) else ():
            t, columns = temperature[part, None], linear(hidden[part], weight, torch.float32)
            probs = torch.exp(columns / t - normalizer[part, None])
            grads = probs * rest_slope[part, None]
            if live:
                places = ids[part] - ctx.first
                here, places = (places >= 0) & (places < live), places.clamp(0, live - 1)
                more = probs.gather(1, places) * (slopes[part] - rest_slope[part, None])
                grads.scatter_add_(1, places, more.masked_fill(~here, 0.0))
            narrow = (grads * (grad[part, None] / t)).to(weight.dtype)
            grad_hidden[part] = narrow @ weight
            add_product(grad_weight[:live], narrow.t(), hidden[part])
        narrow_grad = grad_weight.to(weight.dtype) if ctx.main_grad is None else None
        return grad_hidden, narrow_grad, *[None] * 5


def _outcomes(scaled: Tensor, top: TopTokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL [B] and log-sum-exps [B] of scaled logits [B, V], which are written; and, of the tokens
    [B, k] and of the rest [B], d KL / d logit over the probability: log ratio - KL."""
    vocab_size, ids = scaled.shape[1], top.token_ids.long()
    normalizer = logsumexp(scaled)
    known, places = ids < vocab_size, ids.clamp(max=vocab_size - 1)
    own = scaled.gather(1, places) - normalizer[:, None]
    own = own.masked_fill(~known, _NEVER)  # of a larger vocabulary: it cannot be said here
    least = own.new_full((), float("inf")).where(~known, _NEVER)
    rest = logsumexp(scaled.scatter_reduce_(1, places, least, "amin")) - normalizer
    outcomes = torch.cat([own, rest[:, None]], 1)
    ratios = outcomes - torch.cat([top.logprobs, top.rest[:, None]], 1)
    ratios = ratios.masked_fill(outcomes == _NEVER, 0.0)
    probs = outcomes.exp()
    # Of nearly 1 it would be what two nearly equal numbers differ by.
    centred = ratios - ratios.gather(1, probs.argmax(1, keepdim=True))
    slopes = centred - (probs * centred).sum(1, keepdim=True)
    return (probs * ratios).sum(1), normalizer, slopes[:, :-1], slopes[:, -1]


def reverse_kl(
    hidden: Tensor,
    weight: Tensor,
    top: TopTokens,
    temperature: Tensor,
    vocab_size: int,
    ranks: RankGroup = ALONE,
    main_grad: Tensor | None = None,
) -> Tensor:
    """KL(own || other) [T] fp32 over the other's k likeliest tokens and the rest.

    The own distributions are softmaxes of hidden @ weight.T / temperature, arguments as in
    `logprob`; it is differentiable in hidden and weight. `top` [T] are the other's, which may have
    more tokens than vocab_size: own probabilities of those are 0.
    """
    return _ReverseKl.apply(hidden, weight, top, temperature, vocab_size, ranks, main_grad)
