"""sample: Gumbel-max over the allowed tokens, with noise keyed by what the token is.

Contract: x = word (token id mod 4) of Philox4x32-10 with key (seed low, seed high) and counter
(token id div 4, position, sample id low, sample id high); v = (x + 1) * 2^-32 rounded to fp32, in
(0, 1]; E = -log1p(-v); g = -log(E). The token is the argmax of logit / T + g over the allowed
tokens, ties to the lower id. v rounded up to 1 gives g = -inf: the token is not drawn unless every
allowed token got that (with top_k = 1, once in 2^25 draws); then the lowest allowed id is.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

Allowed tokens are found by thresholds; tokens that tie with a threshold are all kept:
min_p keeps p >= min_p * max p; top_k keeps the k largest logits; top_p, on what those two kept and
renormalised, keeps a token if the tokens strictly more likely hold less than top_p of the mass.
"""

import torch

from samebit.kernels.logprob import logprob_of
from samebit.kernels.op import Op, require_fp32

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORDS = 4  # of a counter
_CHUNK = 1 << 13  # counters at a time: the ten rounds stay in the CPU's cache


def philox_4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
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


def gumbel_from_bits(x: torch.Tensor) -> torch.Tensor:
    """The contract's g in fp32 from x, int64 tensors of unsigned 32-bit integers."""
    v = (x + 1).to(torch.float32) * 2.0**-32
    return -torch.log(-torch.log1p(-v))


def _gumbel_noise_cpu(
    seeds: torch.Tensor, positions: torch.Tensor, sample_ids: torch.Tensor, vocab_size: int
) -> torch.Tensor:
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


_noise = Op("gumbel_noise", cpu=_gumbel_noise_cpu)


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, sample_ids: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Noise [B, V] fp32 for int64 tensors seeds, positions and sample_ids, all [B]."""
    return _noise(seeds, positions, sample_ids, vocab_size)


def allowed_tokens(
    scaled_logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Mask [B, V] of the tokens that may be drawn; rules and ties in the module's docstring.

    scaled_logits [B, V] fp32 after temperature; top_k [B] int64 (0: off), top_p [B] fp32
    (1: off), min_p [B] fp32 (0: off).
    """
    return _allowed(scaled_logits, top_k, top_p, min_p)


def _allowed_cpu(
    scaled_logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    ordered, _ = scaled_logits.sort(-1, descending=True)
    kth = torch.where(top_k > 0, top_k, scaled_logits.shape[-1]).clamp(max=scaled_logits.shape[-1])
    least = ordered.gather(1, kth[:, None] - 1)
    # p >= min_p * max p, in logits; log(0) = -inf allows all.
    least = torch.maximum(least, ordered[:, :1] + torch.log(min_p)[:, None])
    weights = torch.exp(ordered - ordered[:, :1]).masked_fill(ordered < least, 0.0)
    mass = weights.cumsum(-1)
    # The first token of a run of equal logits has the mass strictly above that run.
    run_start = torch.searchsorted(-ordered, -scaled_logits)
    above = torch.cat([torch.zeros_like(mass[:, :1]), mass], dim=-1).gather(1, run_start)
    within_p = (above < top_p[:, None] * mass[:, -1:]) | (top_p >= 1)[:, None]
    return (scaled_logits >= least) & within_p


_allowed = Op("allowed_tokens", cpu=_allowed_cpu, cuda="samebit.kernels.gpu.vocab:allowed_tokens")


def sample_ref(scaled_logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Token ids [B]: the argmax of scaled_logits + noise, both [B, V]; ties to the lower id.

    A logit of -inf forbids a token; noise of -inf only puts it behind all others.
    """
    least = torch.finfo(noise.dtype).min
    return (scaled_logits + noise.clamp(min=least)).argmax(-1)


def _sample_cpu(scaled_logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    require_fp32("sample", scaled_logits, noise)
    return sample_ref(scaled_logits, noise)


sample = Op("sample", cpu=_sample_cpu)


def _draw_cpu(
    scaled_logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    greedy: torch.Tensor,
) -> torch.Tensor:
    noise = gumbel_noise(seeds, positions, sample_ids, scaled_logits.shape[-1])
    return sample(scaled_logits, noise.masked_fill_(greedy[:, None], 0.0))


_draw = Op("draw", cpu=_draw_cpu, cuda="samebit.kernels.gpu.vocab:draw")


def draw(
    scaled_logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    greedy: torch.Tensor,
) -> torch.Tensor:
    """Next tokens [B] for scaled_logits [B, V] fp32, -inf where a token may not be drawn.

    seeds, positions, sample_ids: int64 [B]; greedy: bool [B], no noise. All on one device.
    """
    return _draw(scaled_logits, seeds, positions, sample_ids, greedy)


def _draw_with_logprobs_cpu(
    logits: torch.Tensor, temperature: torch.Tensor, *keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = logits / temperature[:, None]
    token_ids = _draw(scaled, *keys)
    return token_ids, logprob_of(scaled, token_ids)


_draw_with_logprobs = Op(
    "draw_with_logprobs",
    cpu=_draw_with_logprobs_cpu,
    cuda="samebit.kernels.gpu.vocab:draw_with_logprobs",
)


def draw_with_logprobs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    greedy: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens [B] and their log-probs [B] fp32 where every token may be drawn.

    logits [B, V] fp32 and temperature [B] fp32 > 0; the rest as in `draw`. The same as `draw` and
    `logprob_of` on logits / temperature.
    """
    return _draw_with_logprobs(logits, temperature, seeds, positions, sample_ids, greedy)
