"""reduce: the sum over ranks of fp32 partials, in ascending rank order, with one rounding.

Contract: the same function in engine and trainer, so that a row-parallel product has the same bits
on both sides. The order is written out: a collective's own order may change with its algorithm.
"""

import torch
import torch.distributed as dist


def reduce_ref(partials: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Sum partials (equal shapes, fp32) from rank 0 upwards and round once to dtype."""
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    return total.to(dtype)


def reduce_sum(
    partial: torch.Tensor, group: dist.ProcessGroup | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Sum each rank's fp32 `partial` over `group`; every rank gets the same bits.

    Returns a tensor of partial's shape in `dtype` (default: partial's own). `group` None means
    the default process group.
    """
    partials = [torch.empty_like(partial) for _ in range(dist.get_world_size(group))]
    dist.all_gather(partials, partial.contiguous(), group=group)
    return reduce_ref(partials, dtype or partial.dtype)
