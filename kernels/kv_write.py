"""kv_write: scatter new keys and values to their kv_slots in the paged cache."""

from torch import Tensor

from samebit.kernels.op import Op


def kv_write_ref(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, kv_slots: Tensor
) -> None:
    """Write key and value [T, Hkv, Dh] to kv_slots [T] of caches [P, page_size, Hkv, Dh], in place.

    A kv_slot is page * page_size + place in the page. All must be distinct.
    """
    key_cache.view(-1, *key.shape[1:])[kv_slots] = key
    value_cache.view(-1, *value.shape[1:])[kv_slots] = value


kv_write = Op("kv_write", cpu=kv_write_ref, cuda="samebit.kernels.gpu.kv_write:kv_write")
