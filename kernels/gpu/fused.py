"""Steps of the engine's forward in one kernel each, with the roundings of the single operations.

add_rms_norm: residual sum, rounded, then rms_norm. attention_inputs: rms_norm of every query and
key head, rope, and the write of keys and values to the cache. Sums have the tiles and warps of
kernels/gpu/rows.py, so the bits are those of the composition.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from samebit.kernels.attention_inputs import attention_inputs_ref
from samebit.kernels.gpu.pdl import after_previous, supported
from samebit.kernels.gpu.rows import norm_launch

_HEAD_ROWS = 8


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, w_ptr, y_ptr, total_ptr, num_rows, eps, D, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    place = rows[:, None] * D + columns[None, :]
    w = tl.load(w_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    after_previous(PDL)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    total = (residual + x).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + place, total, mask=inside)
    x = total.to(tl.float32)
    mean = libdevice.div_rn(tl.sum(x * x, axis=1), D.to(tl.float32))
    y = x * libdevice.rsqrt(mean + eps)[:, None] * w[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(s), s) for s = x + residual, both [T, D] contiguous bf16."""
    num_rows, width = x.shape
    y, total = torch.empty_like(x), torch.empty_like(x)
    block, rows, warps = norm_launch(width)
    pdl = supported(x.device)
    if num_rows:
        _add_rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
            x, residual, weight, y, total, num_rows, eps, width, block, rows, pdl,
            num_warps=warps, enable_fp_fusion=False, launch_pdl=pdl,
        )  # fmt: skip
    return y, total


@triton.jit
def _attention_inputs_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, table_ptr, position_ptr, slot_ptr, q_ptr, k_cache, v_cache,
    eps, NUM_KV: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token and kv head: its queries, its key, its value."""
    token, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = H // 2
    r = tl.arange(0, ROWS)
    h, half = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_HALF)
    is_key = r == GROUP
    position = tl.load(position_ptr + token)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    angle = table_ptr + position * H
    cos = tl.load(angle + half, mask=half < HALF, other=0.0)[None, :]
    sin = tl.load(angle + HALF + half, mask=half < HALF, other=0.0)[None, :]
    after_previous(PDL)
    heads = qkv_ptr + (token * NUM_KV + kv) * (GROUP + 2) * H + r[:, None] * H
    inside = (r <= GROUP)[:, None] & (half < HALF)[None, :]
    first = tl.load(heads + half[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + HALF + half[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        dtype = qkv_ptr.dtype.element_ty
        whole = tl.load(
            heads + h[None, :], mask=(r <= GROUP)[:, None] & (h < H)[None, :], other=0.0
        ).to(tl.float32)
        mean = libdevice.div_rn(tl.sum(whole * whole, axis=1), H * 1.0)
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
    q = q_ptr + (token * NUM_KV + kv) * GROUP * H + r[:, None] * H + half[None, :]
    tl.store(q, new_first, mask=is_query)
    tl.store(q + HALF, new_second, mask=is_query)
    to_cache = inside & is_key[:, None] & (slot >= 0)
    k = k_cache + (slot * NUM_KV + kv) * H + r[:, None] * 0 + half[None, :]
    tl.store(k, new_first, mask=to_cache)
    tl.store(k + HALF, new_second, mask=to_cache)
    value = tl.load(
        qkv_ptr + ((token * NUM_KV + kv) * (GROUP + 2) + GROUP + 1) * H + h, mask=h < H, other=0.0
    )
    tl.store(v_cache + (slot * NUM_KV + kv) * H + h, value, mask=(h < H) & (slot >= 0))


def attention_inputs(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    rope_table: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> torch.Tensor:
    """See kernels.attention_inputs."""
    num_tokens = len(qkv)
    num_kv, head_dim = key_cache.shape[-2:]
    group = qkv.shape[1] // (num_kv * head_dim) - 2
    if norms is not None and group >= _HEAD_ROWS:  # the head sums would have another tree
        return attention_inputs_ref(
            qkv, norms, eps, rope_table, positions, slots, key_cache, value_cache
        )
    q = torch.empty(num_tokens, num_kv * group, head_dim, dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm = norms if norms is not None else (qkv, qkv)
    pdl, rows = supported(qkv.device), max(_HEAD_ROWS, triton.next_power_of_2(group + 1))
    if num_tokens:
        _attention_inputs_kernel[(num_tokens, num_kv)](
            qkv, q_norm, k_norm, rope_table, positions, slots, q, key_cache, value_cache, eps,
            num_kv, group, head_dim, triton.next_power_of_2(head_dim),
            triton.next_power_of_2(head_dim // 2), rows, norms is not None, pdl,
            num_warps=4, enable_fp_fusion=False, launch_pdl=pdl,
        )  # fmt: skip
    return q
