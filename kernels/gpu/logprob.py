"""logsumexp, and the statistics and gradients of logits that logprob needs, on the GPU.

Each program handles one of the contract's segments of one row, in blocks of fixed size and order.
The sampler (kernels/gpu/sample.py) uses the same code, and so has the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from samebit.kernels.contract import GPU_LSE_BLOCK, LSE_SEGMENTS, padded_vocab_size

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_GRAD_BLOCK = 2048  # logits that a program of the backward takes; it sums up nothing


@triton.jit
def scaled(x_ptr, columns, end, temperature):
    """logit / T of these columns; -inf past the end."""
    x = tl.load(x_ptr + columns, mask=columns < end, other=float("-inf"))
    if temperature != 1.0:
        x = libdevice.div_rn(x, temperature)
    return x


@triton.jit
def _times_exp(x):
    """x exp(x), 0 for x = -inf."""
    return tl.where(x > float("-inf"), x * tl.exp(x), 0.0)


@triton.jit
def segment_max(x_ptr, start, end, temperature, BLOCK: tl.constexpr):
    """The highest logit / T of one segment of one row; finite, although all of it may be -inf."""
    columns = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for c0 in range(start, end, 4 * BLOCK):
        x0 = scaled(x_ptr, c0 + columns, end, temperature)
        x1 = scaled(x_ptr, c0 + BLOCK + columns, end, temperature)
        x2 = scaled(x_ptr, c0 + 2 * BLOCK + columns, end, temperature)
        x3 = scaled(x_ptr, c0 + 3 * BLOCK + columns, end, temperature)
        best = tl.maximum(best, tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)))
    # A segment of which no token may be drawn has the sum 0 then, not NaN.
    return tl.maximum(tl.max(best, 0), _LOWEST)


@triton.jit
def segment_sum(
    x_ptr, start, end, temperature, m, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr = False
):
    """Sum of exp(x - m) of one segment of one row: block after block, then one tree.

    Four blocks are loaded at a time to keep the memory busy; the sum's order is that of the blocks.
    WEIGHTED: also the sum of (x - m) exp(x - m), which moves no bit of the other.
    """
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for c0 in range(start, end, 4 * BLOCK):
        x0 = scaled(x_ptr, c0 + columns, end, temperature)
        x1 = scaled(x_ptr, c0 + BLOCK + columns, end, temperature)
        x2 = scaled(x_ptr, c0 + 2 * BLOCK + columns, end, temperature)
        x3 = scaled(x_ptr, c0 + 3 * BLOCK + columns, end, temperature)
        total = total + tl.exp(x0 - m)
        total = total + tl.exp(x1 - m)
        total = total + tl.exp(x2 - m)
        total = total + tl.exp(x3 - m)
        if WEIGHTED:
            weighted += _times_exp(x0 - m) + _times_exp(x1 - m)
            weighted += _times_exp(x2 - m) + _times_exp(x3 - m)
    total = tl.where(start < end, tl.sum(total, 0), 0.0)
    return total, tl.where(start < end, tl.sum(weighted, 0), 0.0)


@triton.jit
def _segment_kernel(
    x_ptr, max_ptr, sum_ptr, V, SEGMENT, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr
):
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = segment * SEGMENT
    end = tl.minimum(start + SEGMENT, V)
    m = segment_max(x_ptr + row * V, start, end, 1.0, BLOCK)
    total, _ = segment_sum(x_ptr + row * V, start, end, 1.0, m, BLOCK)
    tl.store(max_ptr + row * SEGMENTS + segment, m)
    tl.store(sum_ptr + row * SEGMENTS + segment, total)


@triton.jit
def merged(max_ptr, sum_ptr, SEGMENTS: tl.constexpr):
    """Log-sum-exp of a row from its segments, in ascending order."""
    m = tl.load(max_ptr)
    total = tl.load(sum_ptr)
    for segment in range(1, SEGMENTS):
        next_m = tl.load(max_ptr + segment)
        next_total = tl.load(sum_ptr + segment)
        new_m = tl.maximum(m, next_m)
        total = total * tl.exp(m - new_m) + next_total * tl.exp(next_m - new_m)
        m = new_m
    return m + libdevice.log(total)


@triton.jit
def _merge_segments_kernel(max_ptr, sum_ptr, out_ptr, SEGMENTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lse = merged(max_ptr + row * SEGMENTS, sum_ptr + row * SEGMENTS, SEGMENTS)
    tl.store(out_ptr + row, lse)


def logsumexp(logits: Tensor) -> Tensor:
    """logits [B, V] fp32 -> [B] fp32."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    parts = torch.empty(2, rows, LSE_SEGMENTS, device=logits.device)
    out = torch.empty(rows, device=logits.device)
    if rows:
        segment = padded_vocab_size(vocab_size) // LSE_SEGMENTS
        _segment_kernel[(rows, LSE_SEGMENTS)](
            x_ptr=logits, max_ptr=parts[0], sum_ptr=parts[1], V=vocab_size, SEGMENT=segment,
            SEGMENTS=LSE_SEGMENTS, BLOCK=GPU_LSE_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _merge_segments_kernel[(rows,)](
            max_ptr=parts[0], sum_ptr=parts[1], out_ptr=out, SEGMENTS=LSE_SEGMENTS,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _segments_kernel(
    x_ptr, temperature_ptr, max_ptr, sum_ptr, weighted_ptr, V, SEGMENT, SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = segment * SEGMENT
    end = tl.minimum(start + SEGMENT, V)
    temperature = tl.load(temperature_ptr + row)
    m = segment_max(x_ptr + row * V, start, end, temperature, BLOCK)
    total, weighted = segment_sum(x_ptr + row * V, start, end, temperature, m, BLOCK, True)
    place = row * SEGMENTS + segment
    tl.store(max_ptr + place, m)
    tl.store(sum_ptr + place, total)
    tl.store(weighted_ptr + place, weighted)


@triton.jit
def _merge_kernel(
    x_ptr, temperature_ptr, id_ptr, max_ptr, sum_ptr, weighted_ptr, logprob_ptr, entropy_ptr,
    normalizer_ptr, V, SEGMENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lse = merged(max_ptr + row * SEGMENTS, sum_ptr + row * SEGMENTS, SEGMENTS)
    tl.store(normalizer_ptr + row, lse)
    entropy = lse * 0  # minus the mean of x - lse
    for segment in range(SEGMENTS):
        place = row * SEGMENTS + segment
        total = tl.load(sum_ptr + place)
        if total > 0:  # not all padding
            shift = tl.load(max_ptr + place) - lse
            entropy -= tl.exp(shift) * (tl.load(weighted_ptr + place) + shift * total)
    tl.store(entropy_ptr + row, entropy)
    x = tl.load(x_ptr + row * V + tl.load(id_ptr + row))
    x = libdevice.div_rn(x, tl.load(temperature_ptr + row))
    tl.store(logprob_ptr + row, x - lse)


def token_stats(
    logits: Tensor, temperature: Tensor, token_ids: Tensor, entropy_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels.logprob.token_stats."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    maxima, sums, weighted = torch.empty(3, rows, LSE_SEGMENTS, device=logits.device)
    logprobs, entropies, normalizers = torch.empty(3, rows, device=logits.device)
    if rows:
        segment = padded_vocab_size(vocab_size) // LSE_SEGMENTS
        _segments_kernel[(rows, LSE_SEGMENTS)](
            x_ptr=logits, temperature_ptr=temperature, max_ptr=maxima, sum_ptr=sums,
            weighted_ptr=weighted, V=vocab_size, SEGMENT=segment, SEGMENTS=LSE_SEGMENTS,
            BLOCK=GPU_LSE_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _merge_kernel[(rows,)](
            x_ptr=logits, temperature_ptr=temperature, id_ptr=token_ids, max_ptr=maxima,
            sum_ptr=sums, weighted_ptr=weighted, logprob_ptr=logprobs, entropy_ptr=entropies,
            normalizer_ptr=normalizers, V=vocab_size, SEGMENTS=LSE_SEGMENTS,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return logprobs, entropies, normalizers


@triton.jit
def _logits_grad_kernel(
    x_ptr, temperature_ptr, normalizer_ptr, id_ptr, grad_ptr, entropy_ptr, entropy_grad_ptr,
    out_ptr, V, BLOCK: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    temperature = tl.load(temperature_ptr + row)
    x = libdevice.div_rn(tl.load(x_ptr + row * V + columns, mask=inside, other=0.0), temperature)
    chosen = (columns == tl.load(id_ptr + row)).to(tl.float32)
    grad = (chosen - tl.exp(x - tl.load(normalizer_ptr + row))) * tl.load(grad_ptr + row)
    if WITH_ENTROPY:
        logprob = x - tl.load(normalizer_ptr + row)
        slope = tl.exp(logprob) * (logprob + tl.load(entropy_ptr + row))
        slope = tl.where(logprob > float("-inf"), slope, 0.0)
        grad -= slope * tl.load(entropy_grad_ptr + row)
    grad = grad / temperature
    tl.store(out_ptr + row * V + columns, grad.to(out_ptr.dtype.element_ty), mask=inside)


def logits_grad(
    logits: Tensor,
    temperature: Tensor,
    normalizer: Tensor,
    token_ids: Tensor,
    grad: Tensor,
    dtype: torch.dtype,
    entropy: Tensor | None = None,
    entropy_grad: Tensor | None = None,
) -> Tensor:
    """See kernels.logprob.logits_grad."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    out = torch.empty(rows, vocab_size, dtype=dtype, device=logits.device)
    if out.numel():
        _logits_grad_kernel[(rows, triton.cdiv(vocab_size, _GRAD_BLOCK))](
            x_ptr=logits, temperature_ptr=temperature, normalizer_ptr=normalizer, id_ptr=token_ids,
            grad_ptr=grad.contiguous(), entropy_ptr=entropy,
            entropy_grad_ptr=None if entropy_grad is None else entropy_grad.contiguous(),
            out_ptr=out, V=vocab_size, BLOCK=_GRAD_BLOCK, WITH_ENTROPY=entropy is not None,
            num_warps=4,
        )  # fmt: skip
    return out
