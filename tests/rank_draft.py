"""The programs of one rank that trains a draft: of data parallel ones, of the target's shards."""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from draft_cases import make_config
from draft_training import make_batches, make_trainer
from rank_programs import start

from samebit.kernels.reduce import ALONE
from samebit.trainer.packing import share_batches

LONG = (3, 23, 2, 14, 9, 20, 17, 6)


def train(rank, size, store, out):
    """Two steps on this rank's share; parameters and stats go to out.RANK."""
    torch.set_num_threads(1)
    ranks = start(rank, size, store)
    steps(out, rank, make_trainer(make_config(), ranks=ranks, passes=2), ranks)


def train_by_shards(rank, size, store, out):
    """The same on all micro-batches, by this rank's rows of the target's vocabulary."""
    torch.set_num_threads(1)
    ranks = start(rank, size, store)
    steps(out, rank, make_trainer(make_config(), target_ranks=ranks, passes=2), ALONE)


def steps(out, rank, trainer, ranks):
    """Two steps on the share of one of ranks."""
    stats = []
    for number in range(2):
        batches = make_batches(trainer.config, LONG, number, max_tokens=30)
        stats.append(asdict(trainer.train_step(share_batches(batches, ranks.size)[ranks.rank])))
    params = {name: param.detach() for name, param in trainer.params.items()}
    torch.save({"params": params, "stats": stats}, Path(out).with_suffix(f".{rank}"))
    dist.barrier()
    dist.destroy_process_group()
