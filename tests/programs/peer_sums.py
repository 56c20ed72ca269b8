"""Sums over a tensor parallel group, ours against an all-reduce of the same size: bits and time.

    torchrun --nproc-per-node N tests/programs/peer_sums.py OUT.json [device=cuda] [most_kib=65536]
        [repeats=7]

Rows of 4,096 numbers, from 8 KiB of bf16 on. Ours takes fp32 partials and gives bf16 sums in rank
order with one rounding, also those of a rank's own rows, and under tp_invariant by the tree; the
all-reduce (NCCL's on GPUs, gloo's on CPUs) adds bf16 partials in an order of its own and rounds at
every rank. Sums to 2 MiB are replayed from a CUDA graph, as in decode. Exit code 1 if a sum has
other bits than those of the gathered partials in rank order, or by the tree.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.kernels.contract import TP_SEGMENTS, tree_sum
from samebit.kernels.reduce import RankGroup, own_rows, reduce_ref, sum_of_own_rows, sum_over_ranks
from samebit.recipes.bench.output import format_table
from samebit.recipes.bench.timing import Spread, timed
from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import resolve_device
from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron.setup import start_processes
from samebit.weight_sync.objects import gather_objects

WIDTH, DTYPE = 4096, torch.bfloat16
OPTIONS = {"device": "cuda", "most_kib": "65536", "repeats": "7"}
GRAPH_BYTES = 2 << 20
"""Up to here sums are replayed from a graph."""
_CALLS = 20  # in a graph, or one after another


def parse(arguments: list[str]) -> dict[str, str]:
    """Options over their defaults."""
    given = dict(argument.split("=", 1) for argument in arguments)
    if unknown := sorted(given.keys() - OPTIONS.keys()):
        raise ValueError(f"'{unknown[0]}' is none of {', '.join(OPTIONS)}")
    return OPTIONS | given


def time_us(action: Callable[[], Any], device: torch.device, graph: bool, repeats: int) -> Spread:
    """Microseconds of a call by this rank's clock; the ranks begin together."""

    def run() -> None:
        for _ in range(_CALLS):
            action()

    run()
    replay = run
    if graph and device.type == "cuda":
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        replay = captured.replay
    times = []
    for _ in range(repeats):
        dist.barrier()
        times.append(timed(replay, device)[1] * 1e6 / _CALLS)
    return Spread.of(times)


def wrong_sums(x: Tensor, ranks: RankGroup) -> list[str]:
    """Which of our sums of the ranks' partials x have not the bits of the gathered ones."""
    parts = [torch.empty_like(x) for _ in range(ranks.size)]
    dist.all_gather(parts, x, group=ranks.group)
    wrong = []
    for invariant in (False, True) if TP_SEGMENTS % ranks.size == 0 else (False,):
        group = replace(ranks, invariant=invariant)
        truth = tree_sum(parts).to(DTYPE) if invariant else reduce_ref(parts, DTYPE)
        name = "by the tree" if invariant else "in rank order"
        if not torch.equal(sum_over_ranks(x, group, DTYPE), truth):
            wrong.append(f"sum {name}")
        if len(x) % ranks.size == 0:
            own = sum_of_own_rows(x, group, DTYPE)
            if not torch.equal(own, own_rows(truth, ranks)):
                wrong.append(f"own rows {name}")
    return wrong


def measure(rows: int, ranks: RankGroup, device: torch.device, repeats: int) -> dict[str, Any]:
    """One size."""
    generator = torch.Generator(device).manual_seed(ranks.rank)
    x = torch.randn(rows, WIDTH, device=device, generator=generator)
    low = x.to(DTYPE)
    actions = {"sum": partial(sum_over_ranks, x, ranks, DTYPE)}
    if rows % ranks.size == 0:
        actions["own rows"] = partial(sum_of_own_rows, x, ranks, DTYPE)
    if TP_SEGMENTS % ranks.size == 0:
        actions["tree"] = partial(sum_over_ranks, x, replace(ranks, invariant=True), DTYPE)
    actions["all_reduce"] = partial(dist.all_reduce, low, group=ranks.group)
    graph = low.nbytes <= GRAPH_BYTES
    times = {name: time_us(action, device, graph, repeats) for name, action in actions.items()}
    wrong = sorted({name for rank in gather_objects(wrong_sums(x, ranks)) for name in rank})
    return {
        "rows": rows,
        "bytes": low.nbytes,
        "us": {name: asdict(spread) for name, spread in times.items()},
        "ratio": times["sum"].median / times["all_reduce"].median,
        "wrong": wrong,
    }


def table(found: list[dict[str, Any]]) -> str:
    """Medians."""
    names = ("sum", "own rows", "tree", "all_reduce")
    lines = [["rows", "KiB", *(f"{name} us" for name in names), "ratio"]]
    for row in found:
        times = [f"{row['us'][name]['median']:.1f}" if name in row["us"] else "-" for name in names]
        size = f"{row['bytes'] / 1024:.0f}"
        lines.append([str(row["rows"]), size, *times, f"{row['ratio']:.2f}"])
    return format_table(lines)


def main(out: str, *arguments: str) -> int:
    """Run in every process; the first writes the report."""
    options = parse(list(arguments))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        raise ValueError("sums are of several processes: start it under torchrun")
    device = resolve_device(options["device"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    start_processes(device, ParallelConfig(tensor=size))
    ranks = RankGroup(dist.get_rank(), size, dist.group.WORLD)
    rows = [1 << n for n in range(14) if (1 << n) * WIDTH * 2 <= int(options["most_kib"]) * 1024]
    found = [measure(n, ranks, device, int(options["repeats"])) for n in rows]
    if ranks.rank == 0:
        report = {"width": WIDTH, "tensor": size, "sums": found}
        write_result(Path(out), device, report, ["torchrun", *sys.argv])
        print(table(found))
    wrong = [f"{row['rows']} rows: {name}" for row in found for name in row["wrong"]]
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
