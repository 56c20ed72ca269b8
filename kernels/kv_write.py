"""kv_write: scatter new keys and values to their kv_slots in the paged cache."""

import torch

from samebit.kernels.op import Op, require_fp32


def kv_write_ref(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_slots: torch.Tensor,
) -> None:
    """Write key and value [T, Hkv, Dh] to kv_slots [T] of caches [P, page_size, Hkv, Dh], in place.

    A kv_slot is page * page_size + place in the page. All must be distinct.
    """
    key_cache.view(-1, *key.shape[1:])[kv_slots] = key
    value_cache.view(-1, *value.shape[1:])[kv_slots] = value


def _kv_write_cpu(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_slots: torch.Tensor,
) -> None:
    require_fp32("kv_write", key, value, key_cache, value_cache)
    kv_write_ref(key, value, key_cache, value_cache, kv_slots)


kv_write = Op("kv_write", cpu=_kv_write_cpu, cuda="samebit.kernels.gpu.kv_write:kv_write")
