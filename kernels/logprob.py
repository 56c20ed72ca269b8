"""logprob: the log-probability of given tokens under softmax(hidden @ weight.T / temperature).

Contract: logits are linear's fp32 output divided by the temperature in fp32. The vocabulary counts
as padded to a multiple of 1,024 whose padding is -inf, and is cut into 8 equal segments: the
log-sum-exp of each segment, then the 8 merged in ascending order. So tensor parallel sizes
1, 2, 4 and 8 give equal bits. The softmax is the full one, before any top-k, top-p or min-p.
Rows are taken in chunks; [T, V] never exists.
"""

from typing import Any

import torch
import torch.nn.functional as F

from samebit.kernels.linear import add_product, main_grad_of
from samebit.kernels.linear import logits as linear_fp32
from samebit.kernels.op import Op, require_fp32
from samebit.kernels.reduce import ALONE, RankGroup, gather_columns

VOCAB_MULTIPLE = 1024
NUM_SEGMENTS = 8


def padded_vocab_size(vocab_size: int) -> int:
    """vocab_size rounded up to a multiple of 1,024, whatever the tensor parallel size."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def logsumexp_ref(logits: torch.Tensor) -> torch.Tensor:
    """logits [B, V] -> [B], in plain torch: a tolerance reference."""
    return logits.float().logsumexp(-1)


def _logsumexp_cpu(logits: torch.Tensor) -> torch.Tensor:
    require_fp32("logsumexp", logits)
    segment_len = padded_vocab_size(logits.shape[-1]) // NUM_SEGMENTS
    # Segments that are all padding would add exact zeros, so they are left out.
    padded = F.pad(logits, (0, -logits.shape[-1] % segment_len), value=float("-inf"))
    segments = padded.view(len(logits), padded.shape[1] // segment_len, segment_len)
    segment_max = segments.amax(-1)
    segment_sum = torch.exp(segments - segment_max[..., None]).sum(-1)
    row_max, row_sum = segment_max[:, 0], segment_sum[:, 0]
    for i in range(1, segments.shape[1]):
        new_max = torch.maximum(row_max, segment_max[:, i])
        row_sum = row_sum * torch.exp(row_max - new_max) + segment_sum[:, i] * torch.exp(
            segment_max[:, i] - new_max
        )
        row_max = new_max
    return row_max + torch.log(row_sum)


logsumexp = Op("logsumexp", cpu=_logsumexp_cpu, cuda="samebit.kernels.gpu.vocab:logsumexp")


def logprob_of(scaled_logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B] of token_ids [B] under scaled_logits [B, V] (fp32)."""
    chosen = scaled_logits.gather(1, token_ids[:, None]).squeeze(1)
    return chosen - logsumexp(scaled_logits)


def logits_of(
    hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, ranks: RankGroup = ALONE
) -> torch.Tensor:
    """Logits [T, V] fp32 on every rank, before any temperature; arguments as in `logprob`."""
    if ranks.size == 1:
        return linear_fp32(hidden, weight[:vocab_size])
    return gather_columns(linear_fp32(hidden, weight), ranks)[:, :vocab_size].contiguous()


def token_stats_ref(
    logits: torch.Tensor, temperature: torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scaled = logits / temperature[:, None]
    normalizer = logsumexp(scaled)
    logprobs = scaled.gather(1, token_ids[:, None]).squeeze(1) - normalizer
    probs = torch.exp(scaled - normalizer[:, None])
    return logprobs, normalizer - (probs * scaled).sum(-1), normalizer


def logits_grad_ref(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    normalizer: torch.Tensor,
    token_ids: torch.Tensor,
    grad: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    t, chosen = temperature[:, None], token_ids[:, None]
    grad_logits = torch.exp(logits / t - normalizer[:, None]).neg_()
    here = (chosen >= 0) & (chosen < logits.shape[1])
    if logits.shape[1]:
        place = chosen.clamp(0, logits.shape[1] - 1)
        grad_logits.scatter_(1, place, grad_logits.gather(1, place) + here)
    grad_logits *= grad[:, None] / t
    return grad_logits.to(dtype)


_GPU = "samebit.kernels.gpu.vocab_training"
token_stats = Op("token_stats", cpu=token_stats_ref, cuda=f"{_GPU}:token_stats")
"""logits [T, V] fp32, temperature [T], token_ids [T] -> log-probs, entropies, log-sum-exps [T]."""
logits_grad = Op("logits_grad", cpu=logits_grad_ref, cuda=f"{_GPU}:logits_grad")
"""Gradient of log-probs in logits [T, V], as `dtype`: logits, temperature, log-sum-exps, token_ids
(a token outside [0, V) is another rank's), gradients of the log-probs, dtype."""


def _chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits at a time: on a GPU 2,048 rows of V = 151,936 are 1.2 GB, elsewhere 512."""
    return max(2048 if device.type == "cuda" else 512, (1 << 22) // vocab_size)


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        token_ids: torch.Tensor,
        temperature: torch.Tensor,
        vocab_size: int,
        ranks: RankGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.main_grad = main_grad_of(weight)
        ctx.first = ranks.rank * len(weight)  # the vocabulary's part that this rank holds
        live = max(0, min(len(weight), vocab_size - ctx.first))
        rows = _chunk_rows(vocab_size, hidden.device)
        chunks = zip(*(x.split(rows) for x in (hidden, temperature, token_ids)), strict=True)
        stats = [
            token_stats(logits_of(h, weight, vocab_size, ranks), t, ids) for h, t, ids in chunks
        ]
        logprobs, entropy, normalizers = (torch.cat(x) for x in zip(*stats, strict=True))
        ctx.save_for_backward(hidden, weight[:live], token_ids, temperature, normalizers)
        ctx.weight_shape, ctx.chunk_rows = weight.shape, rows
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, _grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, token_ids, temperature, normalizer = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = ctx.main_grad
        if grad_weight is None:
            grad_weight = torch.zeros(ctx.weight_shape, device=weight.device)
        rows, live = ctx.chunk_rows, len(weight)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            narrow = logits_grad(
                linear_fp32(hidden[part], weight),
                temperature[part],
                normalizer[part],
                token_ids[part] - ctx.first,
                grad[part],
                weight.dtype,
            )
            grad_hidden[part] = narrow @ weight
            add_product(grad_weight[:live], narrow.t(), hidden[part])
        narrow_grad = grad_weight.to(weight.dtype) if ctx.main_grad is None else None
        return grad_hidden, narrow_grad, None, None, None, None


def logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    temperature: torch.Tensor,
    vocab_size: int,
    ranks: RankGroup = ALONE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the next-token distributions.

    hidden [T, D], weight [padded V / size, D] (this rank's rows; those of the vocabulary from
    vocab_size on are padding), token_ids [T] int64, temperature [T] fp32 > 0 -> (logprobs [T] fp32,
    differentiable in hidden and weight; entropies [T] fp32 in nats, not differentiable). With
    several ranks, hidden's gradient is this rank's summand.
    """
    return _Logprob.apply(hidden, weight, token_ids, temperature, vocab_size, ranks)
