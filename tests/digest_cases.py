"""Weights of awkward shapes for the digest, and values that are hard to round."""

import torch

from samebit.weight_sync.digest import Part
from samebit.weight_sync.mapping import ParamSpec, RowBlock

TIES = (1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, -1 - 3 * 2**-8, 0.0, -0.0, 1e-45)


def awkward(device):
    """(specs, params, parts): odd shapes, vectors, padding, rows that lie apart, shards of columns,
    several tiles of rows and columns, masters from any element on."""
    generator = torch.Generator().manual_seed(1)
    specs, params, parts = [], {}, []
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        for j, (rows, columns, apart) in enumerate(SHAPES):
            name, hf_name = f"p{i}.{j}", f"x{i}.{j}"
            half = rows // 2
            blocks = (RowBlock(1, hf_name, 3, half - 1), RowBlock(half, hf_name, 90, rows - half))
            tail = (columns,) if columns else ()
            hf_shape = (rows + 100, *(2 * n for n in tail))
            specs.append(ParamSpec(name, (rows, *tail), blocks, {hf_name: hf_shape}, columns // 2))
            memory = torch.randn(rows, *(n + apart for n in tail), generator=generator)
            param = memory.to(device, dtype)
            params[name] = param[:, :columns] if columns else param
            master = params[name].float().contiguous().flatten() * 1.001
            master[: len(TIES)] = torch.tensor(TIES, device=device)[: len(master)]
            master[-1] = torch.finfo(torch.bfloat16).max if i else 1.0
            cut = len(master) // 3
            parts += [Part(name, 0, master[:cut].clone()), Part(name, cut, master[cut:].clone())]
    return specs, params, parts


SHAPES = ((3, 5, 0), (70, 16, 0), (70, 16, 8), (9, 24, 3), (5, 1040, 0), (37, 0, 0), (130, 1, 0))


def not_finite(rectangle):
    """Puts what is not finite, or not once it is rounded, into the last element, one by one."""
    values, infinity = rectangle.values, torch.inf
    rounded = values.dtype != rectangle.dtype
    kept = values[-1, -1].clone()
    for value in (infinity, -infinity, torch.nan, *[LEAST_ROUNDED, -LEAST_ROUNDED] * rounded):
        values[-1, -1] = value
        yield value
    values[-1, -1] = kept


# Of fp32, halfway between the largest number of bf16 and infinity.
LEAST_ROUNDED = float.fromhex("0x1.FFp127")


def signed(total):
    """A sum modulo 2^64 as int64 holds it."""
    return total - (1 << 64) if total >> 63 else total
