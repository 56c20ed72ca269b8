"""The programs of one rank that trains and is watched: what a StreamObserver is shown there."""

from pathlib import Path

import torch
import torch.distributed as dist
from policy_steps import gradient_samples
from rank_programs import make_trainer, start

from samebit.trainer.packing import pack_samples

STREAMS = (0, 1, 2, 3, 4)


class Kept:
    """Keeps what it is shown of each micro-batch: index, streams, and the policy's parameters
    outside of its layers as they are then, which a stage of a pipeline partly has copies of."""

    streams = STREAMS

    def __init__(self, policy):
        from samebit.trainer.megatron.outer_params import OuterParams

        self.shown = []
        self._outer = OuterParams(policy)

    def observe(self, batch, streams):
        self._outer.refresh()
        outer = {name: param.clone() for name, param in self._outer.params.items()}
        found = {layer: stream.clone() for layer, stream in streams.items()}
        self.shown.append((batch.index, found, outer))


def shown(folder, parallel=None):
    """What the first of two steps shows, then what the second does, whose weights are others; and
    the policy's digest after them, watched and not."""
    from samebit.trainer.algorithms.sft import Sft

    batches = pack_samples(gradient_samples(), 70)  # three: interleaved stages add a filler
    digests = []
    for is_watched in (False, True):
        policy = make_trainer(folder, parallel)
        if is_watched:
            policy.observer = kept = Kept(policy)
        for _ in range(2):
            policy.train_step(batches, Sft())
        digests.append(policy.digest())
    return kept.shown[: len(batches)], kept.shown[len(batches) :], digests


def alone(folder, out):
    """Of one process."""
    torch.set_num_threads(1)
    torch.save(shown(folder), out)


def watched(rank, size, store, folder, mode, out):
    """Of one rank of a layout, which is named as in rank_programs.trainer; in out.RANK."""
    from samebit.trainer.config import ParallelConfig

    torch.set_num_threads(1)
    start(rank, size, store)
    also = {"sequence": "tensor", "virtual_pipeline": "pipeline"}
    parts = mode.split("+")
    layout = {part: 2 for part in parts if part != "sequence"}
    layout |= {also[part]: 2 for part in parts if part in also}
    parallel = ParallelConfig(**layout, sequence="sequence" in parts)
    torch.save(shown(folder, parallel), Path(out).with_suffix(f".{rank}"))
    dist.barrier()
    dist.destroy_process_group()
