"""What ranks tell each other and sum up, as one rank's program of three."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from rank_programs import start

from samebit.kernels.reduce import (
    gather_columns,
    gather_rows,
    own_rows,
    row_parallel_linear,
    sum_of_own_rows,
    sum_over_ranks,
    vocab_parallel_embedding,
)
from samebit.trainer.ranks import is_first, on_first, place, together
from samebit.weight_sync.digest import digest_sum, weights_digest
from samebit.weight_sync.failures import CrashError
from samebit.weight_sync.mapping import ParamSpec, RowBlock
from samebit.weight_sync.objects import gather_objects, smallest


class Told(RuntimeError):
    """What the others raise."""


def failing(*ranks, crashing=None):
    """What each rank learns of an error on these, and of one that may pass on another."""
    try:
        with together(Told):
            if place()[0] == crashing:
                raise KeyError(f"lost {crashing}")
            if place()[0] in ranks:
                raise OSError(f"full {place()[0]}")
    except (OSError, KeyError, Told) as error:
        return type(error).__name__, str(error)
    return None


def first_alone(fails):
    """What each rank gets of a function that the first one runs."""
    calls = []

    def function():
        calls.append(place()[0])
        if fails:
            raise KeyError("gone")
        return {"from": place()[0], "seen": [1.5, None, "é"]}

    try:
        found = on_first(function, Told)
    except (KeyError, CrashError) as error:
        found = type(error).__name__, str(error)
    return found, calls


def agree(rank, size, store, out):
    """Everything by name as JSON; tensors as lists."""
    torch.set_num_threads(1)
    ranks = start(rank, size, store)
    own, group = ranks.rank, ranks.group
    parts = torch.tensor([[1.0, 2.0**25], [2.0**25, 1.0], [-(2.0**25), -(2.0**25)]])
    rounded = torch.tensor([1.0, 2.0**-8, 2.0**-8])
    rows = torch.arange(6.0).view(3, 2) + 10 * own
    table = torch.arange(1.0, 13.0).view(6, 2).chunk(3)[own]
    weight = torch.tensor([[1.0, 2.0**25, -(2.0**25)], [2.0**25, 1.0, -(2.0**25)]])
    spec = ParamSpec("w", (1, 2), (RowBlock(0, "w", own, 1),), {"w": (3, 2)})
    shard = {"w": torch.tensor([[1.5, -2.0]]) * (own + 1)}
    found = {
        "place": [*place(), is_first()],
        "objects": gather_objects({"rank": own, "long": "x" * 1000 * own, "values": [0.1] * own}),
        "smallest": [smallest(value, group) for value in (own, 5 - own)],
        "sum": sum_over_ranks(parts[own], ranks, torch.float32).tolist(),
        "rounded once": sum_over_ranks(rounded[own], ranks, torch.bfloat16).tolist(),
        "own rows of sum": sum_of_own_rows(rows, ranks, torch.float32).tolist(),
        "columns": gather_columns(rows[:1], ranks).tolist(),
        "rows": gather_rows(rows[:1], ranks).tolist(),
        "own": own_rows(torch.arange(6), ranks).tolist(),
        "embedding": vocab_parallel_embedding(torch.tensor([5, 0, 3]), table, ranks).tolist(),
        "linear": row_parallel_linear(torch.ones(1, 1), weight[:, own : own + 1], ranks).tolist(),
        "digest": weights_digest([spec], shard, group),
        "digest sums": sum(gather_objects(digest_sum([spec], shard))) % (1 << 64),
        "no failure": failing(),
        "one fails": failing(1),
        "two fail": failing(2, 1),
        "one fails, one crashes": failing(1, crashing=0),
        "first": first_alone(fails=False),
        "first fails": first_alone(fails=True),
    }
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
