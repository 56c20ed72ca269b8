"""Row and element operations on the GPU: rms_norm, rope, swiglu, kv_write.

Every program handles whole rows with a fixed block and fixed warps, so a row's sum has one tree.
No fusion of multiply and add (enable_fp_fusion=False): each rounding is where it is written.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    inverse_ptr,
    num_rows,
    stride,
    eps,
    D,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    mean = libdevice.div_rn(tl.sum(x * x, axis=1), D.to(tl.float32))
    inverse = libdevice.rsqrt(mean + eps)
    w = tl.load(w_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    y = x * inverse[:, None] * w[None, :]
    place = rows[:, None] * D + columns[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_ptr + rows, inverse, mask=rows < num_rows)


def norm_launch(width: int) -> tuple[int, int, int]:
    """(block, rows, warps) of a program that normalises rows of `width`: they fix a sum's tree."""
    block = triton.next_power_of_2(width)
    return block, 8 if block <= 256 else 1, 4 if block <= 4096 else 8


def flat_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [rows, D], each row without gaps."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] -> (normalised [..., D], inverse rms [..., 1] fp32)."""
    flat, width = flat_rows(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block, rows, warps = norm_launch(width)
    grid = (triton.cdiv(flat.shape[0], rows),)
    _rms_norm_kernel[grid](
        flat,
        weight,
        y,
        inverse,
        flat.shape[0],
        flat.stride(0),
        eps,
        width,
        block,
        rows,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y, inverse.unsqueeze(-1)


@triton.jit
def _rope_kernel(
    x_ptr,
    position_ptr,
    table_ptr,
    y_ptr,
    stride_token,
    stride_head,
    num_heads,
    HALF,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.arange(0, BLOCK_H)
    inside = (heads < num_heads)[:, None] & (half < HALF)[None, :]
    angle = table_ptr + tl.load(position_ptr + token) * (2 * HALF)
    cos = tl.load(angle + half, mask=half < HALF, other=0.0)[None, :]
    sin = tl.load(angle + HALF + half, mask=half < HALF, other=0.0)[None, :]
    source = x_ptr + token * stride_token + heads[:, None] * stride_head + half[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = y_ptr + (token * num_heads + heads[:, None]) * (2 * HALF) + half[None, :]
    dtype = y_ptr.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(target + HALF, (second * cos + first * sin).to(dtype), mask=inside)


def rope(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x [T, heads, H] rotated to positions [T] by table [max_position, H] fp32."""
    num_tokens, num_heads, head_dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = min(16, triton.next_power_of_2(num_heads))
    grid = (num_tokens, triton.cdiv(num_heads, block_n))
    if num_tokens:
        _rope_kernel[grid](
            x,
            positions,
            table,
            y,
            x.stride(0),
            x.stride(1),
            num_heads,
            head_dim // 2,
            block_n,
            triton.next_power_of_2(head_dim // 2),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return y


@triton.jit
def _swiglu_kernel(x_ptr, y_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(x_ptr + row * 2 * F + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + columns, mask=inside, other=0.0).to(tl.float32)
    silu = libdevice.div_rn(gate, 1.0 + tl.exp(-gate))
    tl.store(y_ptr + row * F + columns, (silu * up).to(y_ptr.dtype.element_ty), mask=inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2F] -> [..., F]."""
    flat = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
    width = flat.shape[1] // 2
    y = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(width))
    if flat.shape[0]:
        _swiglu_kernel[(flat.shape[0], triton.cdiv(width, block))](
            flat, y, width, block, num_warps=4, enable_fp_fusion=False
        )
    return y


@triton.jit
def _kv_write_kernel(
    k_ptr, v_ptr, k_cache, v_cache, slot_ptr, k_stride, v_stride, k_head, v_head, H, WIDTH,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, d = place // H, place % H
    inside = place < WIDTH
    slot = tl.load(slot_ptr + token).to(tl.int64)
    target = slot * WIDTH + place
    k = tl.load(k_ptr + token * k_stride + head * k_head + d, mask=inside)
    v = tl.load(v_ptr + token * v_stride + head * v_head + d, mask=inside)
    tl.store(k_cache + target, k, mask=inside & (slot >= 0))
    tl.store(v_cache + target, v, mask=inside & (slot >= 0))


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """key and value [T, K, H] to slots [T] of caches [P, page_size, K, H]; -1 is nowhere."""
    num_tokens, num_heads, head_dim = key.shape
    width = num_heads * head_dim
    block = min(1024, triton.next_power_of_2(width))
    if num_tokens:
        _kv_write_kernel[(num_tokens, triton.cdiv(width, block))](
            key,
            value,
            key_cache,
            value_cache,
            slots,
            key.stride(0),
            value.stride(0),
            key.stride(1),
            value.stride(1),
            head_dim,
            width,
            block,
            num_warps=4,
        )
