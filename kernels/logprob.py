"""logprob: the log-probability of given tokens under softmax(hidden @ weight.T / temperature).

Contract (docs/contract.md): the log-sum-exps of 8 segments of the vocabulary merge in ascending
order, so that tensor parallel sizes 1, 2, 4 and 8 give equal bits. The softmax is the full one,
before any top-k, top-p or min-p, unless it is told which tokens count (kernels/truncation.py).
Rows are taken in chunks; [T, V] never exists.
"""

from typing import Any

import torch
from torch import Tensor

from samebit.kernels.cpu import logprob as cpu
from samebit.kernels.linear import add_product, linear
from samebit.kernels.op import Op
from samebit.kernels.reduce import ALONE, RankGroup, gather_columns
from samebit.kernels.truncation import Kept, KeptSets, Thresholds, kept_sets_of

logsumexp = Op("logsumexp", cpu=cpu.logsumexp, cuda="samebit.kernels.gpu.logprob:logsumexp")
"""logits [B, V] fp32 -> log-sum-exps [B] fp32."""


def logprob_of(scaled_logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities [B] of token_ids [B] under scaled_logits [B, V] (fp32)."""
    chosen = scaled_logits.gather(1, token_ids[:, None]).squeeze(1)
    return chosen - logsumexp(scaled_logits)


def logits(hidden: Tensor, weight: Tensor, vocab_size: int, ranks: RankGroup = ALONE) -> Tensor:
    """Logits [T, V] fp32 on every rank, before any temperature; arguments as in `logprob`."""
    if ranks.size == 1:
        return linear(hidden, weight[:vocab_size], torch.float32)
    columns = linear(hidden, weight, torch.float32)
    return gather_columns(columns, ranks)[:, :vocab_size].contiguous()


def token_stats_ref(
    logits: Tensor, temperature: Tensor, token_ids: Tensor, entropy_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    scaled = logits / temperature[:, None]
    normalizer = logsumexp(scaled)
    logprobs = scaled.gather(1, token_ids[:, None]).squeeze(1) - normalizer
    probs = torch.exp(scaled - normalizer[:, None])
    counted = scaled.masked_fill(scaled == float("-inf"), 0.0)  # where probs are 0
    entropies = normalizer - (probs * counted).sum(-1)
    if entropy_grad:  # the gradient needs what the rounded normalizer itself gives
        entropies = (probs * (normalizer[:, None] - counted)).sum(-1)
    return logprobs, entropies, normalizer


def logits_grad_ref(
    logits: Tensor,
    temperature: Tensor,
    normalizer: Tensor,
    token_ids: Tensor,
    grad: Tensor,
    dtype: torch.dtype,
    entropy: Tensor | None = None,
    entropy_grad: Tensor | None = None,
) -> Tensor:
    t, chosen = temperature[:, None], token_ids[:, None]
    grad_logits = torch.exp(logits / t - normalizer[:, None]).neg_()
    here = (chosen >= 0) & (chosen < logits.shape[1])
    if logits.shape[1]:
        place = chosen.clamp(0, logits.shape[1] - 1)
        grad_logits.scatter_(1, place, grad_logits.gather(1, place) + here)
    grad_logits *= grad[:, None] / t
    if entropy is not None and entropy_grad is not None:
        logprobs = logits / t - normalizer[:, None]
        slopes = logprobs.exp() * (logprobs + entropy[:, None])
        slopes.masked_fill_(logprobs == float("-inf"), 0.0)
        grad_logits -= slopes * (entropy_grad[:, None] / t)
    return grad_logits.to(dtype)


token_stats = Op("token_stats", cpu=token_stats_ref, cuda="samebit.kernels.gpu.logprob:token_stats")
"""logits [T, V] fp32, temperature [T], token_ids [T] -> log-probs, entropies, log-sum-exps [T].
A logit of -inf counts for nothing. entropy_grad: entropies that are differentiated, which on the
CPU are rounded otherwise."""
logits_grad = Op("logits_grad", cpu=logits_grad_ref, cuda="samebit.kernels.gpu.logprob:logits_grad")
"""logits [T, V], temperature [T], log-sum-exps [T], token_ids [T] (one outside [0, V) is another
rank's), gradients of the log-probs [T], dtype -> the gradient of the logits [T, V] in dtype. With
entropies [T] and their gradients [T] too, that of both; without them not a bit of it differs."""


def row_parts(num_rows: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Rows in chunks whose logits exist at a time; one without rows if there are none.

    On a GPU 2,048 rows of V = 151,936 are 1.2 GB, elsewhere 512.
    """
    step = max(2048 if device.type == "cuda" else 512, (1 << 22) // vocab_size)
    return [slice(i, min(i + step, num_rows)) for i in range(0, max(num_rows, 1), step)]


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        temperature: Tensor,
        vocab_size: int,
        ranks: RankGroup,
        main_grad: Tensor | None,
        entropy_grad: bool,
        kept: Kept | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.main_grad, ctx.kept = main_grad, kept
        ctx.first = ranks.rank * len(weight)  # the vocabulary's part that this rank holds
        live = max(0, min(len(weight), vocab_size - ctx.first))
        ctx.parts = row_parts(len(hidden), vocab_size, hidden.device)
        stats = []
        for part in ctx.parts:
            scores, t = logits(hidden[part], weight, vocab_size, ranks), temperature[part]
            if kept is not None:
                scores = kept.part(part).restrict(scores, t)
            stats.append(token_stats(scores, t, token_ids[part], entropy_grad))
        logprobs, entropy, normalizers = (torch.cat(x) for x in zip(*stats, strict=True))
        saved = (hidden, weight[:live], token_ids, temperature, normalizers)
        ctx.save_for_backward(*saved, *([entropy] if entropy_grad else []))
        ctx.weight_shape = weight.shape
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, temperature, normalizer, *entropy = ctx.saved_tensors
        of_entropy = [*entropy, entropy_grad] if entropy else []
        grad_hidden = torch.empty_like(hidden)
        grad_weight = ctx.main_grad
        if grad_weight is None:
            grad_weight = torch.zeros(ctx.weight_shape, device=weight.device)
        live = len(weight)
        for part in ctx.parts if len(hidden) else ():
            columns = linear(hidden[part], weight, torch.float32)
            if ctx.kept is not None:
                columns = ctx.kept.part(part).restrict(columns, temperature[part], ctx.first)
            narrow = logits_grad(
                columns,
                temperature[part],
                normalizer[part],
                token_ids[part] - ctx.first,
                grad[part],
                weight.dtype,
                *(x[part] for x in of_entropy),
            )
            grad_hidden[part] = narrow @ weight
            add_product(grad_weight[:live], narrow.t(), hidden[part])
        narrow_grad = grad_weight.to(weight.dtype) if ctx.main_grad is None else None
        return grad_hidden, narrow_grad, *[None] * 7


def logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    vocab_size: int,
    ranks: RankGroup = ALONE,
    main_grad: Tensor | None = None,
    entropy_grad: bool = False,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the next-token distributions.

    hidden [T, D], weight [padded V / size, D] (this rank's rows; those of the vocabulary from
    vocab_size on are padding), token_ids [T] int64, temperature [T] fp32 > 0 -> (logprobs [T] fp32,
    differentiable in hidden and weight; entropies [T] fp32 in nats, differentiable if entropy_grad
    is set). With several ranks, hidden's gradient is this rank's summand. main_grad: as in
    `linear`, of weight's shape. kept: the distributions are those of the kept tokens alone, which
    must be all rows' own; a token outside them has the log-prob -inf.
    """
    return _Logprob.apply(
        hidden, weight, token_ids, temperature, vocab_size, ranks, main_grad, entropy_grad, kept
    )


def kept_sets(
    hidden: Tensor,
    weight: Tensor,
    thresholds: Thresholds,
    temperature: Tensor,
    vocab_size: int,
    ranks: RankGroup = ALONE,
) -> KeptSets:
    """Which tokens thresholds [T] keep under these weights; other arguments as in `logprob`."""
    return KeptSets.joined(
        [
            kept_sets_of(
                logits(hidden[part], weight, vocab_size, ranks),
                temperature[part],
                thresholds.part(part),
            )
            for part in row_parts(len(hidden), vocab_size, hidden.device)
        ]
    )
