"""rope on the GPU: one token and a few heads to a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope_kernel(
    x_ptr, position_ptr, table_ptr, y_ptr, stride_token, stride_head, num_heads, HALF,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    half = tl.arange(0, BLOCK_HALF)
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


def rope(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """x [T, heads, Dh] rotated to positions [T] by table [max_position, Dh] fp32."""
    num_tokens, num_heads, head_dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_heads = min(16, triton.next_power_of_2(num_heads))
    grid = (num_tokens, triton.cdiv(num_heads, block_heads))
    if num_tokens:
        _rope_kernel[grid](
            x_ptr=x, position_ptr=positions, table_ptr=table, y_ptr=y, stride_token=x.stride(0),
            stride_head=x.stride(1), num_heads=num_heads, HALF=head_dim // 2,
            BLOCK_HEADS=block_heads, BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return y
