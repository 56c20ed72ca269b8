"""The program of one data parallel rank that trains a draft."""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from draft_cases import make_config
from draft_training import make_batches, make_trainer
from rank_programs import start

from samebit.trainer.packing import share_batches

LONG = (3, 23, 2, 14, 9, 20, 17, 6)


def train(rank, size, store, out):
    """Two steps on this rank's share; parameters and stats go to out.RANK."""
    torch.set_num_threads(1)
    ranks, config = start(rank, size, store), make_config()
    trainer, stats = make_trainer(config, ranks=ranks, passes=2), []
    for number in range(2):
        batches = make_batches(config, LONG, number, max_tokens=30)
        stats.append(asdict(trainer.train_step(share_batches(batches, ranks.size)[ranks.rank])))
    params = {name: param.detach() for name, param in trainer.params.items()}
    torch.save({"params": params, "stats": stats}, Path(out).with_suffix(f".{rank}"))
    dist.barrier()
    dist.destroy_process_group()
