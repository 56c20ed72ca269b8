"""One forward step of the model over the paged cache."""

import torch

from samebit.kernels.attention import paged_attention
from samebit.kernels.kv_write import kv_write
from samebit.rollout.models.decoder import Decoder
from samebit.rollout.runtime.batch import Batch
from samebit.rollout.runtime.kv_cache import KVCache


class Runner:
    """Model and cache together."""

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.device = model.embedding.device

    @torch.no_grad()
    def forward(
        self, batch: Batch, collect: set[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Compute the batch's tokens; their keys and values are in the cache afterwards.

        Returns (hidden [T, D] after the final norm, residual streams of `collect`).
        """
        scale = self.model.config.softmax_scale

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            kv_write(k, v, keys, values, batch.slots)
            return paged_attention(q, keys, values, batch.plan, scale)

        return self.model.forward(batch.input_ids, batch.positions, attend, collect)
