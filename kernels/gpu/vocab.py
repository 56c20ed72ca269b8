"""Operations over the vocabulary on the GPU: logsumexp, draw, allowed_tokens.

Rows are cut into the contract's 8 segments; each program handles one segment of one row in blocks
of fixed size and order, so neither the batch nor the card's size can change a sum.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from samebit.kernels.logprob import NUM_SEGMENTS, padded_vocab_size

_BLOCK = 1024


@triton.jit
def _segment_kernel(
    x_ptr, max_ptr, sum_ptr, V, SEGMENT, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr
):
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = segment * SEGMENT
    end = tl.minimum(start + SEGMENT, V)
    columns = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for c0 in range(start, end, BLOCK):
        x = tl.load(x_ptr + row * V + c0 + columns, mask=c0 + columns < end, other=float("-inf"))
        best = tl.maximum(best, x)
    m = tl.max(best, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for c0 in range(start, end, BLOCK):
        x = tl.load(x_ptr + row * V + c0 + columns, mask=c0 + columns < end, other=float("-inf"))
        total += tl.exp(x - m)
    tl.store(max_ptr + row * SEGMENTS + segment, m)
    tl.store(sum_ptr + row * SEGMENTS + segment, tl.where(start < V, tl.sum(total, 0), 0.0))


@triton.jit
def _merge_segments_kernel(max_ptr, sum_ptr, out_ptr, SEGMENTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(max_ptr + row * SEGMENTS)
    total = tl.load(sum_ptr + row * SEGMENTS)
    for segment in range(1, SEGMENTS):
        next_m = tl.load(max_ptr + row * SEGMENTS + segment)
        next_total = tl.load(sum_ptr + row * SEGMENTS + segment)
        new_m = tl.maximum(m, next_m)
        total = total * tl.exp(m - new_m) + next_total * tl.exp(next_m - new_m)
        m = new_m
    tl.store(out_ptr + row, m + libdevice.log(total))


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """logits [B, V] fp32 -> [B] fp32."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    parts = torch.empty(2, rows, NUM_SEGMENTS, device=logits.device)
    out = torch.empty(rows, device=logits.device)
    if rows:
        segment = padded_vocab_size(vocab_size) // NUM_SEGMENTS
        _segment_kernel[(rows, NUM_SEGMENTS)](
            logits,
            parts[0],
            parts[1],
            vocab_size,
            segment,
            NUM_SEGMENTS,
            _BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
        _merge_segments_kernel[(rows,)](
            parts[0], parts[1], out, NUM_SEGMENTS, num_warps=1, enable_fp_fusion=False
        )
    return out


@triton.jit
def _gumbel(seed, token, position, sample_low, sample_high):
    x, _, _, _ = tl.philox(seed, token, position, sample_low, sample_high)
    v = (x.to(tl.uint64) + 1).to(tl.float32) * 2.3283064365386963e-10
    return -libdevice.log(-libdevice.log1p(-v))


@triton.jit
def _draw_kernel(
    x_ptr,
    seed_ptr,
    position_ptr,
    sample_ptr,
    greedy_ptr,
    value_ptr,
    token_ptr,
    V,
    SEGMENT,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = segment * SEGMENT
    end = tl.minimum(start + SEGMENT, V)
    seed = tl.load(seed_ptr + row)
    sample = tl.load(sample_ptr + row)
    zeros = tl.zeros((BLOCK,), tl.uint32)
    position = zeros + tl.load(position_ptr + row).to(tl.uint32)
    low = zeros + (sample & 0xFFFFFFFF).to(tl.uint32)
    high = zeros + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    greedy = tl.load(greedy_ptr + row) != 0
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    for c0 in range(start, end, BLOCK):
        column = c0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * V + column, mask=column < end, other=float("-inf"))
        noise = _gumbel(seed, column.to(tl.uint32), position, low, high)
        # Noise of -inf only puts a token behind all others; a logit of -inf forbids it.
        value = tl.where(greedy, x, x + tl.maximum(noise, -3.4028234663852886e38))
        # A NaN wins, so that damaged logits cannot hide behind a healthy token.
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        token = tl.where(better, column, token)
    top = tl.max(best, 0)
    found = tl.min(tl.where(best == top, token, 0x7FFFFFFF), 0)
    tl.store(value_ptr + row * SEGMENTS + segment, top)
    tl.store(token_ptr + row * SEGMENTS + segment, found)


def draw(
    scaled_logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    greedy: torch.Tensor,
) -> torch.Tensor:
    """See kernels.sample.draw."""
    scaled_logits = scaled_logits.contiguous()
    rows, vocab_size = scaled_logits.shape
    device = scaled_logits.device
    values = torch.empty(rows, NUM_SEGMENTS, device=device)
    tokens = torch.empty(rows, NUM_SEGMENTS, dtype=torch.int32, device=device)
    if rows:
        segment = padded_vocab_size(vocab_size) // NUM_SEGMENTS
        _draw_kernel[(rows, NUM_SEGMENTS)](
            scaled_logits,
            seeds,
            positions,
            sample_ids,
            greedy,
            values,
            tokens,
            vocab_size,
            segment,
            NUM_SEGMENTS,
            _BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    best = values.amax(-1, keepdim=True)
    # Maxima and minima are exact; ties go to the lower id.
    none = torch.full_like(tokens, vocab_size - 1)
    return torch.where(values == best, tokens, none).amin(-1).clamp(max=vocab_size - 1).long()


@triton.jit
def _key(x):
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _count_and_mass(x_ptr, row, V, threshold, least, top, BLOCK: tl.constexpr):
    """How many keys are >= threshold, and the mass of those > threshold and >= least."""
    columns = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for c0 in range(0, V, BLOCK):
        inside = c0 + columns < V
        x = tl.load(x_ptr + row * V + c0 + columns, mask=inside, other=float("-inf"))
        key = _key(x)
        count += (inside & (key >= threshold)).to(tl.int32)
        counted = inside & (key > threshold) & (key >= least)
        mass += tl.where(counted, tl.exp(x - top), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _threshold_kernel(x_ptr, k_ptr, p_ptr, min_p_ptr, out_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k, p, min_p = tl.load(k_ptr + row), tl.load(p_ptr + row), tl.load(min_p_ptr + row)
    columns = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for c0 in range(0, V, BLOCK):
        inside = c0 + columns < V
        x = tl.load(x_ptr + row * V + c0 + columns, mask=inside, other=float("-inf"))
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    lowest = tl.full((), -2139095041, tl.int64)  # the key of -inf
    least = tl.where(min_p > 0, _key(top + libdevice.log(min_p)), lowest)
    if k > 0:
        # The largest threshold that at least k keys reach.
        low, high = lowest, _key(top)
        while low < high:
            middle = low + (high - low + 1) // 2
            count, _ = _count_and_mass(x_ptr, row, V, middle, lowest, top, BLOCK)
            enough = count >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        least = tl.maximum(least, low)
    if p < 1:
        # The smallest threshold above which less than p of the remaining mass lies.
        _, total = _count_and_mass(x_ptr, row, V, least - 1, least, top, BLOCK)
        low, high = least, _key(top)
        while low < high:
            middle = low + (high - low) // 2
            _, mass = _count_and_mass(x_ptr, row, V, middle, least, top, BLOCK)
            little = mass < p * total
            high = tl.where(little, middle, high)
            low = tl.where(little, low, middle + 1)
        least = tl.maximum(least, low)
    bits = least.to(tl.int32)
    tl.store(out_ptr + row, (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))


def allowed_tokens(
    scaled_logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """See kernels.sample.allowed_tokens. Thresholds by bisection over the floats: no sort."""
    scaled_logits = scaled_logits.contiguous()
    rows, vocab_size = scaled_logits.shape
    least = torch.empty(rows, device=scaled_logits.device)
    _threshold_kernel[(rows,)](
        scaled_logits,
        top_k.clamp(max=vocab_size),
        top_p,
        min_p,
        least,
        vocab_size,
        4 * _BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return scaled_logits >= least[:, None]
