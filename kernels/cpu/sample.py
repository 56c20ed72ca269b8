"""sample on the CPU: Philox words, Gumbel noise from them, and thresholds by a sort."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORDS = 4  # of a counter
_CHUNK = 1 << 13  # counters at a time: the ten rounds stay in the CPU's cache


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox on int64 tensors that hold unsigned 32-bit words (broadcastable)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def gumbel_from_bits(x: Tensor) -> Tensor:
    """The contract's g in fp32 from x, int64 tensors of unsigned 32-bit integers."""
    v = (x + 1).to(torch.float32) * 2.0**-32
    return -torch.log(-torch.log1p(-v))


def gumbel_noise(seeds: Tensor, positions: Tensor, sample_ids: Tensor, vocab_size: int) -> Tensor:
    """See kernels.sample.gumbel_noise."""
    counters = torch.arange(-(-vocab_size // _WORDS))
    noise = torch.empty(len(seeds), len(counters), _WORDS)
    rows = max(1, _CHUNK // len(counters))
    words = [w[:, None] for w in (positions, sample_ids & _MASK, (sample_ids >> 32) & _MASK)]
    keys = [w[:, None] for w in (seeds & _MASK, (seeds >> 32) & _MASK)]
    for i in range(0, len(seeds), rows):
        for j in range(0, len(counters), _CHUNK):
            part = slice(i, i + rows)
            counter = (counters[j : j + _CHUNK], *(w[part] for w in words))
            bits = torch.stack(philox_4x32(counter, tuple(k[part] for k in keys)), dim=-1)
            noise[part, j : j + _CHUNK] = gumbel_from_bits(bits)
    return noise.flatten(1)[:, :vocab_size]


def least_allowed(scaled_logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """See kernels.sample.least_allowed."""
    ordered, _ = scaled_logits.sort(-1, descending=True)
    kth = torch.where(top_k > 0, top_k, scaled_logits.shape[-1]).clamp(max=scaled_logits.shape[-1])
    least = ordered.gather(1, kth[:, None] - 1)
    # p >= min_p * max p, in logits; log(0) = -inf allows all.
    least = torch.maximum(least, ordered[:, :1] + torch.log(min_p)[:, None])
    weights = torch.exp(ordered - ordered[:, :1]).masked_fill(ordered < least, 0.0)
    mass = weights.cumsum(-1)
    # The first token of a run of equal logits has the mass strictly above that run.
    run_start = torch.searchsorted(-ordered, -ordered)
    above = torch.cat([torch.zeros_like(mass[:, :1]), mass], dim=-1).gather(1, run_start)
    within_p = (above < top_p[:, None] * mass[:, -1:]) | (top_p >= 1)[:, None]
    # Mass only grows along a row, so what is within p is its beginning.
    last = within_p.sum(-1, keepdim=True).clamp(min=1) - 1
    return torch.maximum(least, ordered.gather(1, last)).squeeze(1)
