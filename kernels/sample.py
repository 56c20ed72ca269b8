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
from torch import Tensor

from samebit.kernels.cpu import sample as cpu
from samebit.kernels.logprob import logprob_of
from samebit.kernels.op import Op

gumbel_noise = Op("gumbel_noise", cpu=cpu.gumbel_noise)
"""Noise [B, V] fp32 for int64 tensors seeds, positions and sample_ids, all [B], and V."""

allowed_tokens = Op(
    "allowed_tokens", cpu=cpu.allowed_tokens, cuda="samebit.kernels.gpu.sample:allowed_tokens"
)
"""Mask [B, V] of the tokens that may be drawn; rules and ties in the module's docstring.

scaled_logits [B, V] fp32 after temperature; top_k [B] int64 (0: off), top_p [B] fp32 (1: off),
min_p [B] fp32 (0: off)."""


def sample_ref(scaled_logits: Tensor, noise: Tensor) -> Tensor:
    """Token ids [B]: the argmax of scaled_logits + noise, both [B, V]; ties to the lower id.

    A logit of -inf forbids a token; noise of -inf only puts it behind all others.
    """
    least = torch.finfo(noise.dtype).min
    return (scaled_logits + noise.clamp(min=least)).argmax(-1)


sample = Op("sample", cpu=sample_ref)


def draw_ref(
    scaled_logits: Tensor, seeds: Tensor, positions: Tensor, sample_ids: Tensor, greedy: Tensor
) -> Tensor:
    """Next tokens [B] for scaled_logits [B, V] fp32, -inf where a token may not be drawn.

    seeds, positions, sample_ids: int64 [B]; greedy: bool [B], no noise. All on one device.
    """
    noise = gumbel_noise(seeds, positions, sample_ids, scaled_logits.shape[-1])
    return sample(scaled_logits, noise.masked_fill_(greedy[:, None], 0.0))


draw = Op("draw", cpu=draw_ref, cuda="samebit.kernels.gpu.sample:draw")


def draw_with_logprobs_ref(
    logits: Tensor, temperature: Tensor, *keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Next tokens [B] and their log-probs [B] fp32 where every token may be drawn.

    logits [B, V] fp32 and temperature [B] fp32 > 0; the rest as in `draw`. The same as `draw` and
    `logprob_of` on logits / temperature.
    """
    scaled = logits / temperature[:, None]
    token_ids = draw(scaled, *keys)
    return token_ids, logprob_of(scaled, token_ids)


draw_with_logprobs = Op(
    "draw_with_logprobs",
    cpu=draw_with_logprobs_ref,
    cuda="samebit.kernels.gpu.sample:draw_with_logprobs",
)
