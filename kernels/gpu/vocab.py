"""Operations over the vocabulary on the GPU: logsumexp, draw (with log-probs), allowed_tokens.

Rows are cut into the contract's 8 segments; each program handles one segment of one row in blocks
of fixed size and order, so neither the batch nor the card's size can change a sum.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from samebit.kernels.logprob import NUM_SEGMENTS, padded_vocab_size

BLOCK = 1024
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _scaled(x_ptr, columns, end, temperature):
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
def segment_sum(
    x_ptr, start, end, temperature, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr = False
):
    """(max, sum of exp(x - max)) of one segment of one row: block after block, then one tree.

    Four blocks are loaded at a time to keep the memory busy; the sum's order is that of the blocks.
    WEIGHTED: also the sum of (x - max) exp(x - max), which moves no bit of the others.
    """
    columns = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for c0 in range(start, end, 4 * BLOCK):
        x0 = _scaled(x_ptr, c0 + columns, end, temperature)
        x1 = _scaled(x_ptr, c0 + BLOCK + columns, end, temperature)
        x2 = _scaled(x_ptr, c0 + 2 * BLOCK + columns, end, temperature)
        x3 = _scaled(x_ptr, c0 + 3 * BLOCK + columns, end, temperature)
        best = tl.maximum(best, tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)))
    m = tl.max(best, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for c0 in range(start, end, 4 * BLOCK):
        x0 = _scaled(x_ptr, c0 + columns, end, temperature)
        x1 = _scaled(x_ptr, c0 + BLOCK + columns, end, temperature)
        x2 = _scaled(x_ptr, c0 + 2 * BLOCK + columns, end, temperature)
        x3 = _scaled(x_ptr, c0 + 3 * BLOCK + columns, end, temperature)
        total = total + tl.exp(x0 - m)
        total = total + tl.exp(x1 - m)
        total = total + tl.exp(x2 - m)
        total = total + tl.exp(x3 - m)
        if WEIGHTED:
            weighted += _times_exp(x0 - m) + _times_exp(x1 - m)
            weighted += _times_exp(x2 - m) + _times_exp(x3 - m)
    total = tl.where(start < end, tl.sum(total, 0), 0.0)
    return m, total, tl.where(start < end, tl.sum(weighted, 0), 0.0)


@triton.jit
def _segment_kernel(
    x_ptr, max_ptr, sum_ptr, V, SEGMENT, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr
):
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = segment * SEGMENT
    end = tl.minimum(start + SEGMENT, V)
    m, total, _ = segment_sum(x_ptr + row * V, start, end, 1.0, BLOCK)
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
            BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
        _merge_segments_kernel[(rows,)](
            parts[0], parts[1], out, NUM_SEGMENTS, num_warps=1, enable_fp_fusion=False
        )
    return out


@triton.jit
def _uniform(seed, counters, position, low, high, N: tl.constexpr):
    """counters [N] -> [N, 4] fp32 in (0, 1]: of tokens 4 counters, ..., 4 counters + 3."""
    a, b, c, d = tl.philox(seed, counters, position, low, high)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (N, 4))
    return (words.to(tl.uint64) + 1).to(tl.float32) * 2.3283064365386963e-10


@triton.jit
def _best_token(
    x_ptr, start, end, temperature, seed, position, sample_id, greedy, BLOCK: tl.constexpr
):
    """(value, token) of the largest x / T + noise in [start, end); ties to the lower id.

    start is a multiple of 4. E = -log1p(-v) is at least v, so a token's noise is at most -log(v):
    a block where not even that beats what was found is left after one approximate logarithm.
    """
    N: tl.constexpr = BLOCK // 4
    zeros = tl.zeros((N,), tl.uint32)
    position = zeros + position.to(tl.uint32)
    low = zeros + (sample_id & 0xFFFFFFFF).to(tl.uint32)
    high = zeros + ((sample_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    place = 4 * tl.arange(0, N)[:, None] + tl.arange(0, 4)[None, :]
    best = tl.full((N, 4), float("-inf"), tl.float32)
    token = tl.full((N, 4), 0x7FFFFFFF, tl.int32)
    top = tl.full((), float("-inf"), tl.float32)
    for c0 in range(start, end, BLOCK):
        x = _scaled(x_ptr, c0 + place, end, temperature)
        counters = (c0 // 4 + tl.arange(0, N)).to(tl.uint32)
        v = _uniform(seed, counters, position, low, high, N)
        # 0.001 is far more than the error of both logarithms.
        bound = tl.where(greedy, x, x + (0.001 - 0.6931471805599453 * libdevice.fast_log2f(v)))
        if tl.max(tl.where(x != x, float("inf"), bound)) > top:
            noise = -libdevice.log(-libdevice.log1p(-v))
            # Noise of -inf only puts a token behind all others; a logit of -inf forbids it.
            value = tl.where(greedy, x, x + tl.maximum(noise, _LOWEST))
            # A NaN keeps its place; that logits are damaged shows in their log-sum-exp.
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            token = tl.where(better, c0 + place, token)
            top = tl.max(best)
    return top, tl.min(tl.where(best == top, token, 0x7FFFFFFF))


@triton.jit
def _sample_kernel(
    x_ptr, temperature_ptr, seed_ptr, position_ptr, sample_ptr, greedy_ptr, max_ptr, sum_ptr,
    value_ptr, token_ptr, V, SEGMENT, PART, SEGMENTS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a segment (programs below SEGMENTS), or the best token of a part."""
    row, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_row = x_ptr + row * V
    temperature = tl.load(temperature_ptr + row)
    if job < SEGMENTS:
        start = job * SEGMENT
        end = tl.minimum(start + SEGMENT, V)
        m, total, _ = segment_sum(x_row, start, end, temperature, BLOCK)
        tl.store(max_ptr + row * SEGMENTS + job, m)
        tl.store(sum_ptr + row * SEGMENTS + job, total)
    else:
        part = job - SEGMENTS
        start = part * PART
        top, found = _best_token(
            x_row, start, tl.minimum(start + PART, V), temperature, tl.load(seed_ptr + row),
            tl.load(position_ptr + row), tl.load(sample_ptr + row),
            tl.load(greedy_ptr + row) != 0, BLOCK,
        )  # fmt: skip
        tl.store(value_ptr + row * PARTS + part, top)
        tl.store(token_ptr + row * PARTS + part, found)


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
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    greedy: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.sample.draw_with_logprobs."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    device = logits.device
    # The draw is exact, so it may be cut up as suits the number of rows; the sum may not.
    parts = max(NUM_SEGMENTS, min(64, 512 // max(rows, 1)))
    part = triton.cdiv(triton.cdiv(vocab_size, parts), BLOCK) * BLOCK
    parts = triton.cdiv(vocab_size, part)
    sums = torch.empty(2, rows, NUM_SEGMENTS, device=device)
    values = torch.empty(rows, parts, device=device)
    tokens = torch.empty(rows, parts, dtype=torch.int32, device=device)
    chosen = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, device=device)
    if rows:
        segment = padded_vocab_size(vocab_size) // NUM_SEGMENTS
        _sample_kernel[(rows, NUM_SEGMENTS + parts)](
            logits, temperature, seeds, positions, sample_ids, greedy, sums[0], sums[1], values,
            tokens, vocab_size, segment, part, NUM_SEGMENTS, parts, BLOCK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        _choose_kernel[(rows,)](
            logits, temperature, sums[0], sums[1], values, tokens, chosen, logprobs, vocab_size,
            NUM_SEGMENTS, parts, triton.next_power_of_2(parts), num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return chosen, logprobs


def draw(
    scaled_logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    greedy: torch.Tensor,
) -> torch.Tensor:
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
        4 * BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return scaled_logits >= least[:, None]
