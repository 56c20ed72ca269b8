"""Sums over GPUs, ours against NCCL's all-reduce of the same result.

    python -m torch.distributed.run --nproc-per-node 2 -m samebit.recipes.bench.reduce OUT.json

Rows of 4,096 numbers: our fp32 partials in, bf16 sums out, in rank order with one rounding; NCCL
adds bf16 partials in an order of its own and rounds at every rank. Small sums are timed in a CUDA
graph, as in decode.
"""

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from samebit.kernels.reduce import RankGroup, sum_of_own_rows, sum_over_ranks
from samebit.recipes.bench.output import BenchError, format_table
from samebit.recipes.bench.timing import Action, Spread
from samebit.recipes.run.provenance import provenance
from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron.setup import start_processes
from samebit.weight_sync.disk import write_atomically

WIDTH = 4096
ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192)
GRAPH_ROWS = 256
"""Up to here sums are replayed from a graph."""


def time_us(action: Action, in_graph: bool, repeats: int = 7, calls: int = 20) -> Spread:
    """Microseconds of a call by this rank's clock; the ranks begin together."""

    def run() -> None:
        for _ in range(calls):
            action()

    run()
    replay: Action = run
    if in_graph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    times = []
    for _ in range(repeats):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return Spread.of(times)


def measure(ranks: RankGroup, device: torch.device) -> list[dict[str, Any]]:
    """One row a size."""
    found = []
    for rows in ROWS:
        generator = torch.Generator(device).manual_seed(ranks.rank)
        x = torch.randn(rows, WIDTH, device=device, generator=generator)
        low, in_graph = x.to(torch.bfloat16), rows <= GRAPH_ROWS
        actions = {"sum": partial(sum_over_ranks, x, ranks, torch.bfloat16)}
        if rows % ranks.size == 0:
            actions["own rows"] = partial(sum_of_own_rows, x, ranks, torch.bfloat16)
        actions["nccl"] = partial(dist.all_reduce, low, group=ranks.group)
        times = {name: time_us(action, in_graph) for name, action in actions.items()}
        found.append(
            {
                "rows": rows,
                "bytes": low.nbytes,
                "us": {name: asdict(spread) for name, spread in times.items()},
                "ratio": times["sum"].median / times["nccl"].median,
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Medians."""
    names = ("sum", "own rows", "nccl")
    lines = [["rows", "KiB", *(f"{name} us" for name in names), "ratio"]]
    for row in found:
        times = [f"{row['us'][name]['median']:.1f}" if name in row["us"] else "-" for name in names]
        size = f"{row['bytes'] / 1024:.0f}"
        lines.append([str(row["rows"]), size, *times, f"{row['ratio']:.2f}"])
    return format_table(lines)


def main(out: str) -> int:
    """Run on every GPU; the first writes the report."""
    if "LOCAL_RANK" not in os.environ:
        raise BenchError("sums over GPUs are timed under torch.distributed.run, one process a GPU")
    size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local)
    start_processes(device, ParallelConfig(tensor=size))
    ranks = RankGroup(dist.get_rank(), size, dist.group.WORLD)
    found = measure(ranks, device)
    if ranks.rank == 0:
        body = {"width": WIDTH, "tensor": size, "reduce": found}
        source = provenance(["python", "-m", "samebit.recipes.bench.reduce", out], device)
        write_atomically(Path(out), json.dumps(source | body, indent=1) + "\n")
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
