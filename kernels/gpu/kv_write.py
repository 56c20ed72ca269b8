"""kv_write on the GPU."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kv_write_kernel(
    k_ptr, v_ptr, k_cache, v_cache, kv_slot_ptr, k_stride, v_stride, k_head, v_head, DH, WIDTH,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, d = place // DH, place % DH
    inside = place < WIDTH
    kv_slot = tl.load(kv_slot_ptr + token).to(tl.int64)
    target = kv_slot * WIDTH + place
    k = tl.load(k_ptr + token * k_stride + head * k_head + d, mask=inside)
    v = tl.load(v_ptr + token * v_stride + head * v_head + d, mask=inside)
    tl.store(k_cache + target, k, mask=inside & (kv_slot >= 0))
    tl.store(v_cache + target, v, mask=inside & (kv_slot >= 0))


def kv_write(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, kv_slots: Tensor
) -> None:
    """Write key and value [T, Hkv, Dh] to kv_slots [T] of the caches; one of -1 is nowhere."""
    num_tokens, num_heads, head_dim = key.shape
    width = num_heads * head_dim
    block = min(1024, triton.next_power_of_2(width))
    if num_tokens:
        _kv_write_kernel[(num_tokens, triton.cdiv(width, block))](
            k_ptr=key, v_ptr=value, k_cache=key_cache, v_cache=value_cache, kv_slot_ptr=kv_slots,
            k_stride=key.stride(0), v_stride=value.stride(0), k_head=key.stride(1),
            v_head=value.stride(1), DH=head_dim, WIDTH=width, BLOCK=block, num_warps=4,
        )  # fmt: skip
