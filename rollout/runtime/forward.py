"""The model's forward over the paged cache."""

import torch
from torch import Tensor

from samebit.kernels.attention_inputs import attention_inputs
from samebit.kernels.attention_kind import AttentionKind
from samebit.rollout.models.decoder import Decoder, Norms
from samebit.rollout.runtime.batch import Batch
from samebit.rollout.runtime.kv_cache import KVCache


@torch.no_grad()
def forward(
    model: Decoder,
    cache: KVCache,
    attention: AttentionKind,
    batch: Batch,
    collect: set[int],
    rows: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Compute the batch's tokens; their keys and values are in the cache afterwards.

    Returns (hidden [S, D] after the final norm of `rows`, residual streams of `collect`).
    """
    config = model.config

    def attend(layer: int, qkv: Tensor, norms: Norms) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        q = attention_inputs(
            qkv, norms, config.norm_eps, model.rope_table, batch.positions, batch.kv_slots, keys,
            values,
        )  # fmt: skip
        return attention.attend(q, keys, values, batch.plan)

    return model.forward(batch.input_ids, attend, collect, rows)
