"""The training side of logprob on the GPU: one pass over a chunk's logits forward, one backward.

The log-sum-exp has the code of the sampler's (kernels/gpu/vocab.py), and so its bits.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from samebit.kernels.gpu.vocab import BLOCK as _BLOCK
from samebit.kernels.gpu.vocab import merged, segment_sum
from samebit.kernels.logprob import NUM_SEGMENTS, padded_vocab_size


@triton.jit
def _segments_kernel(
    x_ptr, temperature_ptr, max_ptr, sum_ptr, weighted_ptr, V, SEGMENT, SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = segment * SEGMENT
    end = tl.minimum(start + SEGMENT, V)
    temperature = tl.load(temperature_ptr + row)
    m, total, weighted = segment_sum(x_ptr + row * V, start, end, temperature, BLOCK, True)
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
    logits: torch.Tensor, temperature: torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See kernels.logprob.token_stats."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    parts = torch.empty(3, rows, NUM_SEGMENTS, device=logits.device)
    logprobs, entropies, normalizers = torch.empty(3, rows, device=logits.device)
    if rows:
        segment = padded_vocab_size(vocab_size) // NUM_SEGMENTS
        _segments_kernel[(rows, NUM_SEGMENTS)](
            logits, temperature, *parts, vocab_size, segment, NUM_SEGMENTS, _BLOCK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        _merge_kernel[(rows,)](
            logits, temperature, token_ids, *parts, logprobs, entropies, normalizers, vocab_size,
            NUM_SEGMENTS, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return logprobs, entropies, normalizers


@triton.jit
def _logits_grad_kernel(
    x_ptr, temperature_ptr, normalizer_ptr, id_ptr, grad_ptr, out_ptr, V, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    temperature = tl.load(temperature_ptr + row)
    x = libdevice.div_rn(tl.load(x_ptr + row * V + columns, mask=inside, other=0.0), temperature)
    chosen = (columns == tl.load(id_ptr + row)).to(tl.float32)
    grad = (chosen - tl.exp(x - tl.load(normalizer_ptr + row))) * tl.load(grad_ptr + row)
    grad = grad / temperature
    tl.store(out_ptr + row * V + columns, grad.to(out_ptr.dtype.element_ty), mask=inside)


def logits_grad(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    normalizer: torch.Tensor,
    token_ids: torch.Tensor,
    grad: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See kernels.logprob.logits_grad."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    out = torch.empty(rows, vocab_size, dtype=dtype, device=logits.device)
    if out.numel():
        _logits_grad_kernel[(rows, triton.cdiv(vocab_size, 2 * _BLOCK))](
            logits, temperature, normalizer, token_ids, grad.contiguous(), out, vocab_size,
            2 * _BLOCK, num_warps=4,
        )  # fmt: skip
    return out
