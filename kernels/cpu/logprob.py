"""logsumexp on the CPU: the contract's segments of a row, merged in ascending order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from samebit.kernels.contract import LSE_SEGMENTS, padded_vocab_size


def logsumexp(logits: Tensor) -> Tensor:
    """logits [B, V] fp32 -> [B] fp32."""
    segment_len = padded_vocab_size(logits.shape[-1]) // LSE_SEGMENTS
    # Segments that are all padding would add exact zeros, so they are left out.
    padded = F.pad(logits, (0, -logits.shape[-1] % segment_len), value=float("-inf"))
    segments = padded.view(len(logits), padded.shape[1] // segment_len, segment_len)
    # A segment of which no token may be drawn, all of it -inf, has the sum 0 then, not NaN.
    segment_max = segments.amax(-1).clamp(min=torch.finfo(logits.dtype).min)
    segment_sum = torch.exp(segments - segment_max[..., None]).sum(-1)
    row_max, row_sum = segment_max[:, 0], segment_sum[:, 0]
    for i in range(1, segments.shape[1]):
        new_max = torch.maximum(row_max, segment_max[:, i])
        row_sum = row_sum * torch.exp(row_max - new_max) + segment_sum[:, i] * torch.exp(
            segment_max[:, i] - new_max
        )
        row_max = new_max
    return row_max + torch.log(row_sum)
