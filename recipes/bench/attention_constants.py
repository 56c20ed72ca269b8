"""The sweep that settled attention's constants: KV tile x KV split, for decode, prefill, training.

    python -m samebit.recipes.bench.attention_constants out.json

They are part of the numerics contract, so this runs before a contract version and never after.
Shape: 32 query heads, 8 kv heads of 128, bf16, pages of 64. Decode in GB/s of keys and values read,
the others in TFLOP/s of causal attention; medians under CUDA graph replay.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from samebit.recipes.run.provenance import provenance
from samebit.weight_sync.disk import write_atomically

NUM_HEADS, NUM_KV, HEAD_DIM, PAGE = 32, 8, 128, 64
TILES = (64, 128)
SPLITS = (256, 512, 1024, 1 << 30)
DECODE = (
    (1, 512), (1, 8192), (1, 32768), (8, 512), (8, 8192), (64, 512), (64, 2048), (64, 8192),
    (256, 512), (256, 1024), (256, 4096),
)  # fmt: skip
PREFILL = ((1, 512), (8, 1024), (1, 8192))


def _median_ms(action: Any) -> float:
    from triton.testing import do_bench_cudagraph

    action()  # compiles
    with torch.cuda.stream(torch.cuda.Stream()):
        return float(do_bench_cudagraph(action, return_mode="median", rep=40))


def decode_rate(batch: int, context: int, tile: int, split: int) -> float:
    """GB/s of keys and values for `batch` sequences of `context` tokens."""
    from samebit.kernels.gpu.attention import attend, plan

    pages = context // PAGE
    device = torch.device("cuda")
    k, v = (
        torch.randn(batch * context, NUM_KV, HEAD_DIM, device=device).to(torch.bfloat16)
        for _ in range(2)
    )
    q = torch.randn(batch, NUM_HEADS, HEAD_DIM, device=device).to(torch.bfloat16)
    table = torch.randperm(batch * pages).view(batch, pages)
    batch_plan = plan([1] * batch, [context] * batch, table, PAGE, device)
    ms = _median_ms(
        lambda: attend(q, k, v, batch_plan, HEAD_DIM**-0.5, kv_tile=tile, kv_split=split)
    )
    return 2 * k.numel() * k.element_size() / ms / 1e6


def prefill_rate(batch: int, length: int, tile: int, split: int) -> float:
    """TFLOP/s of packed causal attention over `batch` sequences of `length` tokens."""
    from samebit.kernels.gpu.attention import attend, plan

    device = torch.device("cuda")
    total = batch * length
    q = torch.randn(total, NUM_HEADS, HEAD_DIM, device=device).to(torch.bfloat16)
    k, v = (
        torch.randn(total, NUM_KV, HEAD_DIM, device=device).to(torch.bfloat16) for _ in range(2)
    )
    batch_plan = plan([length] * batch, [length] * batch, None, 1, device)
    ms = _median_ms(
        lambda: attend(q, k, v, batch_plan, HEAD_DIM**-0.5, kv_tile=tile, kv_split=split)
    )
    return 2 * 2 * batch * length * length / 2 * NUM_HEADS * HEAD_DIM / ms / 1e9


def main() -> None:
    """Print the table and write it with its provenance."""
    rows = []
    for tile in TILES:
        for split in SPLITS:
            row: dict[str, Any] = {"kv_tile": tile, "kv_split": split if split < 1 << 30 else None}
            for batch, context in DECODE:
                rate = decode_rate(batch, context, tile, split)
                row[f"decode_{batch}x{context}_gb_s"] = round(rate)
            for batch, length in PREFILL:
                rate = prefill_rate(batch, length, tile, split)
                row[f"packed_{batch}x{length}_tflop_s"] = round(rate)
            print(row, flush=True)
            rows.append(row)
    command = ["python", "-m", "samebit.recipes.bench.attention_constants", *sys.argv[1:]]
    report = {**provenance(command, torch.device("cuda")), "rows": rows}
    write_atomically(Path(sys.argv[1]), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
