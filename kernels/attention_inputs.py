"""attention_inputs: from the qkv product to rotated queries, and keys and values in the cache.

Contract: the composition of rms_norm per query and key head (where the model has it), rope, and
kv_write, with their roundings. For inference; training composes the differentiable operations.
"""

from torch import Tensor

from samebit.kernels.contract import GPU_NORM_ROWS
from samebit.kernels.kv_write import kv_write
from samebit.kernels.op import Op
from samebit.kernels.rms_norm import rms_norm
from samebit.kernels.rope import rope


def attention_inputs_ref(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rope_table: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """The composition, by the device's own single operations: a bit reference."""
    num_kv, head_dim = key_cache.shape[-2:]
    by_group = qkv.view(len(qkv), num_kv, -1, head_dim)
    q, k, v = by_group.split([by_group.shape[2] - 2, 1, 1], dim=2)
    q, k, v = q.reshape(len(qkv), -1, head_dim), k.squeeze(2), v.squeeze(2)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    kv_write(rope(k, positions, rope_table), v, key_cache, value_cache, kv_slots)
    return rope(q, positions, rope_table)


_attention_inputs = Op(
    "attention_inputs",
    cpu=attention_inputs_ref,
    cuda="samebit.kernels.gpu.attention_inputs:attention_inputs",
)


def attention_inputs(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rope_table: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """Queries [T, Hq, Dh], normalised and rotated; keys and values go to the caches' kv_slots.

    qkv [T, Hkv * (Hq / Hkv + 2) * Dh] holds for each KV head its queries, its key, its value.
    norms: weights [Dh] of the query and key norms, or None. rope_table [max_position, Dh] fp32,
    positions [T] int64, kv_slots [T] int64, distinct; caches [P, page_size, Hkv, Dh]. On the GPU a
    kv_slot of -1 stores nothing.
    """
    inputs = (qkv, norms, eps, rope_table, positions, kv_slots, key_cache, value_cache)
    num_kv, head_dim = key_cache.shape[-2:]
    group = qkv.shape[1] // (num_kv * head_dim) - 2
    if norms is not None and group >= GPU_NORM_ROWS:  # fused, a head's sum would have another tree
        return attention_inputs_ref(*inputs)
    return _attention_inputs(*inputs)
