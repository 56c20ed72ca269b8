"""sample: Gumbel-max over the allowed tokens, with noise keyed by what the token is.

Contract: docs/contract.md writes out the noise, which tokens are allowed, and all ties. Noise of
-inf (once in 2^25 tokens) only puts a token behind all others: with top_k = 1 it is drawn.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import torch
from torch import Tensor

from samebit.kernels.cpu import sample as cpu
from samebit.kernels.logprob import logprob_of
from samebit.kernels.op import Op

gumbel_noise = Op("gumbel_noise", cpu=cpu.gumbel_noise)
"""Noise [B, V] fp32 for int64 tensors seeds, positions and sample_ids, all [B], and V."""

least_allowed = Op(
    "least_allowed", cpu=cpu.least_allowed, cuda="samebit.kernels.gpu.sample:least_allowed"
)
"""Thresholds [B] fp32: a token may be drawn if its scaled logit is at least its row's.

Rules and ties in docs/contract.md. scaled_logits [B, V] fp32 after temperature; top_k [B] int64
(0: off), top_p [B] fp32 (1: off), min_p [B] fp32 (0: off)."""


def signed64(value: int) -> int:
    """A seed or sample id, unsigned 64 bits, as the signed integer that tensors of keys hold."""
    return value - (1 << 64) if value >> 63 else value


def allowed_tokens(scaled_logits: Tensor, *limits: Tensor) -> Tensor:
    """Mask [B, V] of the tokens that may be drawn; arguments as in `least_allowed`."""
    return scaled_logits >= least_allowed(scaled_logits, *limits)[:, None]


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
