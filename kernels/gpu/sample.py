"""sample on the GPU: draws, with and without their log-probs, and thresholds of allowed tokens.

A log-prob's sum is the contract's, segment by segment (kernels/gpu/logprob.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from samebit.kernels.contract import (
    GPU_LIMITS_BLOCK,
    GPU_LSE_BLOCK,
    LSE_SEGMENTS,
    padded_vocab_size,
)
from samebit.kernels.gpu.logprob import merged, scaled, segment_max, segment_sum

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_TOGETHER_ROWS = 64  # rows from which on a program draws and sums up


@triton.jit
def _random_words(seed, counters, position, low, high, N: tl.constexpr):
    """counters [N] -> [N, 4] uint32: of tokens 4 counters, ..., 4 counters + 3."""
    a, b, c, d = tl.philox(seed, counters, position, low, high)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (N, 4))


@triton.jit
def _most_noise(words):
    """No noise is larger, though it may seem so by a thousandth; for one approximate logarithm.

    E = -log1p(-v) is at least v, so the noise -log(E) is at most -log(v): of v = (word + 1) / 2^32
    this takes the upper 23 bits, and v is no less than they are. Where they are 0, it is infinite.
    """
    v = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    # 0.001 is far more than the error of both logarithms.
    return 0.001 - 0.6931471805599453 * libdevice.fast_log2f(v)


@triton.jit
def _best_token(
    x_ptr, start, end, temperature, seed, position, sample_id, greedy, BLOCK: tl.constexpr
):
    """(value, token) of the largest x / T + noise in [start, end), and the largest x / T there.

    start is a multiple of 4; ties go to the lower id. A block where not even the bound of its
    tokens' noise beats what was found is left without their noise.
    """
    N: tl.constexpr = BLOCK // 4
    zeros = tl.zeros((N,), tl.uint32)
    position = zeros + position.to(tl.uint32)
    low = zeros + (sample_id & 0xFFFFFFFF).to(tl.uint32)
    high = zeros + ((sample_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    place = 4 * tl.arange(0, N)[:, None] + tl.arange(0, 4)[None, :]
    best = tl.full((N, 4), float("-inf"), tl.float32)
    token = tl.full((N, 4), 0x7FFFFFFF, tl.int32)
    highest = tl.full((N, 4), float("-inf"), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    for c0 in range(start, end, BLOCK):
        x = scaled(x_ptr, c0 + place, end, temperature)
        highest = tl.maximum(highest, x)
        counters = (c0 // 4 + tl.arange(0, N)).to(tl.uint32)
        words = _random_words(seed, counters, position, low, high, N)
        bound = tl.where(greedy, x, x + _most_noise(words))
        if tl.max(tl.where(x != x, float("inf"), bound)) > top:
            v = (words.to(tl.uint64) + 1).to(tl.float32) * 2.3283064365386963e-10  # in (0, 1]
            noise = -libdevice.log(-libdevice.log1p(-v))
            # Noise of -inf only puts a token behind all others; a logit of -inf forbids it.
            value = tl.where(greedy, x, x + tl.maximum(noise, _LOWEST))
            # A NaN keeps its place; that logits are damaged shows in their log-sum-exp.
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            token = tl.where(better, c0 + place, token)
            top = tl.max(best)
    return top, tl.min(tl.where(best == top, token, 0x7FFFFFFF)), tl.max(highest)


@triton.jit
def _sample_kernel(
    x_ptr, temperature_ptr, seed_ptr, position_ptr, sample_ptr, greedy_ptr, max_ptr, sum_ptr,
    value_ptr, token_ptr, V, SEGMENT, PART, SEGMENTS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a segment (programs below SEGMENTS), or the best token of a part.

    TOGETHER: a part is a segment, and a program finds both, reading from memory once.
    """
    row, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_row = x_ptr + row * V
    temperature = tl.load(temperature_ptr + row)
    part = job if TOGETHER else job - SEGMENTS
    m = tl.full((), _LOWEST, tl.float32)
    if TOGETHER or part >= 0:
        start = part * PART
        top, found, highest = _best_token(
            x_row, start, tl.minimum(start + PART, V), temperature, tl.load(seed_ptr + row),
            tl.load(position_ptr + row), tl.load(sample_ptr + row),
            tl.load(greedy_ptr + row) != 0, BLOCK,
        )  # fmt: skip
        tl.store(value_ptr + row * PARTS + part, top)
        tl.store(token_ptr + row * PARTS + part, found)
        m = tl.maximum(m, highest)
    if TOGETHER or part < 0:
        start = job * SEGMENT
        end = tl.minimum(start + SEGMENT, V)
        if not TOGETHER:
            m = segment_max(x_row, start, end, temperature, BLOCK)
        total, _ = segment_sum(x_row, start, end, temperature, m, BLOCK)
        tl.store(max_ptr + row * SEGMENTS + job, m)
        tl.store(sum_ptr + row * SEGMENTS + job, total)


@triton.jit
def _choose_kernel(
    x_ptr, temperature_ptr, max_ptr, sum_ptr, value_ptr, token_ptr, chosen_ptr, logprob_ptr, V,
    SEGMENTS: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """The token of a row and its log-prob."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    value = tl.load(value_ptr + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    token = tl.load(token_ptr + row * PARTS + part, mask=part < PARTS, other=0x7FFFFFFF)
    chosen = tl.min(tl.where(value == tl.max(value, 0), token, 0x7FFFFFFF), 0)
    chosen = tl.minimum(chosen, V - 1)
    tl.store(chosen_ptr + row, chosen.to(tl.int64))
    lse = merged(max_ptr + row * SEGMENTS, sum_ptr + row * SEGMENTS, SEGMENTS)
    x = libdevice.div_rn(tl.load(x_ptr + row * V + chosen), tl.load(temperature_ptr + row))
    tl.store(logprob_ptr + row, x - lse)


def draw_with_logprobs(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    sample_ids: Tensor,
    greedy: Tensor,
) -> tuple[Tensor, Tensor]:
    """See kernels.sample.draw_with_logprobs."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    device = logits.device
    segment = padded_vocab_size(vocab_size) // LSE_SEGMENTS
    # The draw is exact, so it may be cut up as suits the number of rows; the sum may not.
    together = rows >= _TOGETHER_ROWS
    if together:
        part, parts = segment, LSE_SEGMENTS
    else:
        parts = max(LSE_SEGMENTS, min(64, 512 // max(rows, 1)))
        part = triton.cdiv(triton.cdiv(vocab_size, parts), GPU_LSE_BLOCK) * GPU_LSE_BLOCK
        parts = triton.cdiv(vocab_size, part)
    maxima, sums = torch.empty(2, rows, LSE_SEGMENTS, device=device)
    values = torch.empty(rows, parts, device=device)
    tokens = torch.empty(rows, parts, dtype=torch.int32, device=device)
    chosen = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, device=device)
    if rows:
        _sample_kernel[(rows, parts if together else LSE_SEGMENTS + parts)](
            x_ptr=logits, temperature_ptr=temperature, seed_ptr=seeds, position_ptr=positions,
            sample_ptr=sample_ids, greedy_ptr=greedy, max_ptr=maxima, sum_ptr=sums,
            value_ptr=values, token_ptr=tokens, V=vocab_size, SEGMENT=segment, PART=part,
            SEGMENTS=LSE_SEGMENTS, PARTS=parts, BLOCK=GPU_LSE_BLOCK, TOGETHER=together,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _choose_kernel[(rows,)](
            x_ptr=logits, temperature_ptr=temperature, max_ptr=maxima, sum_ptr=sums,
            value_ptr=values, token_ptr=tokens, chosen_ptr=chosen, logprob_ptr=logprobs,
            V=vocab_size, SEGMENTS=LSE_SEGMENTS, PARTS=parts,
            BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return chosen, logprobs


def draw(
    scaled_logits: Tensor, seeds: Tensor, positions: Tensor, sample_ids: Tensor, greedy: Tensor
) -> Tensor:
    """See kernels.sample.draw."""
    ones = torch.ones(len(scaled_logits), device=scaled_logits.device)
    return draw_with_logprobs(scaled_logits, ones, seeds, positions, sample_ids, greedy)[0]


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


def least_allowed(scaled_logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """See kernels.sample.least_allowed. By bisection over the floats: no sort."""
    scaled_logits = scaled_logits.contiguous()
    rows, vocab_size = scaled_logits.shape
    least = torch.empty(rows, device=scaled_logits.device)
    _threshold_kernel[(rows,)](
        x_ptr=scaled_logits, k_ptr=top_k.clamp(max=vocab_size), p_ptr=top_p, min_p_ptr=min_p,
        out_ptr=least, V=vocab_size, BLOCK=GPU_LIMITS_BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return least
