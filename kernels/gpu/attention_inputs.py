"""attention_inputs on the GPU: one kernel with the roundings of the single operations.

A head's sum has the rows and warps of rms_norm's, so the bits are those of the composition.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from samebit.kernels.contract import GPU_NORM_ROWS
from samebit.kernels.gpu.pdl import after_previous, supported


@triton.jit
def _attention_inputs_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, table_ptr, position_ptr, kv_slot_ptr, q_ptr, k_cache, v_cache,
    eps, NUM_KV: tl.constexpr, GROUP: tl.constexpr, DH: tl.constexpr, BLOCK_DH: tl.constexpr,
    BLOCK_HALF: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program handles one token and KV head: its queries, its key, its value."""
    token, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = DH // 2
    r = tl.arange(0, ROWS)
    h, half = tl.arange(0, BLOCK_DH), tl.arange(0, BLOCK_HALF)
    is_key = r == GROUP
    position = tl.load(position_ptr + token)
    kv_slot = tl.load(kv_slot_ptr + token).to(tl.int64)
    angle = table_ptr + position * DH
    cos = tl.load(angle + half, mask=half < HALF, other=0.0)[None, :]
    sin = tl.load(angle + HALF + half, mask=half < HALF, other=0.0)[None, :]
    after_previous(PDL)
    heads = qkv_ptr + (token * NUM_KV + kv) * (GROUP + 2) * DH + r[:, None] * DH
    inside = (r <= GROUP)[:, None] & (half < HALF)[None, :]
    first = tl.load(heads + half[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + HALF + half[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        dtype = qkv_ptr.dtype.element_ty
        whole = tl.load(
            heads + h[None, :], mask=(r <= GROUP)[:, None] & (h < DH)[None, :], other=0.0
        ).to(tl.float32)
        mean = libdevice.div_rn(tl.sum(whole * whole, axis=1), DH * 1.0)
        inverse = libdevice.rsqrt(mean + eps)[:, None]
        w = tl.where(is_key, k_norm_ptr.to(tl.int64), q_norm_ptr.to(tl.int64))
        w = w.to(tl.pointer_type(dtype))[:, None] + half[None, :]
        first = first * inverse * tl.load(w, mask=inside, other=0.0).to(tl.float32)
        second = second * inverse * tl.load(w + HALF, mask=inside, other=0.0).to(tl.float32)
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    dtype = q_ptr.dtype.element_ty
    new_first = (first * cos - second * sin).to(dtype)
    new_second = (second * cos + first * sin).to(dtype)
    is_query = inside & (r < GROUP)[:, None]
    q = q_ptr + (token * NUM_KV + kv) * GROUP * DH + r[:, None] * DH + half[None, :]
    tl.store(q, new_first, mask=is_query)
    tl.store(q + HALF, new_second, mask=is_query)
    to_cache = inside & is_key[:, None] & (kv_slot >= 0)
    k = k_cache + (kv_slot * NUM_KV + kv) * DH + r[:, None] * 0 + half[None, :]
    tl.store(k, new_first, mask=to_cache)
    tl.store(k + HALF, new_second, mask=to_cache)
    value = tl.load(
        qkv_ptr + ((token * NUM_KV + kv) * (GROUP + 2) + GROUP + 1) * DH + h, mask=h < DH, other=0.0
    )
    tl.store(v_cache + (kv_slot * NUM_KV + kv) * DH + h, value, mask=(h < DH) & (kv_slot >= 0))


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
    """See kernels.attention_inputs; with norms for groups of fewer than GPU_NORM_ROWS heads."""
    num_tokens = len(qkv)
    num_kv, head_dim = key_cache.shape[-2:]
    group = qkv.shape[1] // (num_kv * head_dim) - 2
    q = torch.empty(num_tokens, num_kv * group, head_dim, dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm = norms if norms is not None else (qkv, qkv)
    pdl, rows = supported(qkv.device), max(GPU_NORM_ROWS, triton.next_power_of_2(group + 1))
    if num_tokens:
        _attention_inputs_kernel[(num_tokens, num_kv)](
            qkv_ptr=qkv, q_norm_ptr=q_norm, k_norm_ptr=k_norm, table_ptr=rope_table,
            position_ptr=positions, kv_slot_ptr=kv_slots, q_ptr=q, k_cache=key_cache,
            v_cache=value_cache, eps=eps, NUM_KV=num_kv, GROUP=group, DH=head_dim,
            BLOCK_DH=triton.next_power_of_2(head_dim),
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2), ROWS=rows, NORM=norms is not None,
            PDL=pdl, num_warps=4, enable_fp_fusion=False, launch_pdl=pdl,
        )  # fmt: skip
    return q
