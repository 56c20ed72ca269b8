"""bf16 weights with fp32 master copies on a CPU, and what several ranks' digests make of them.

The CPU's operations take fp32 alone, so a smooth function of the weights stands for the model.
"""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from policy_steps import gradient_samples
from rank_programs import make_trainer, start

from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.packing import pack_samples
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.session import UpdateSession
from samebit.weight_sync.types import WeightSyncError, WeightVersion


def smooth(gpt, batch, _model, _share=None, _entropy_grad=False):
    """Log-probs that go up as the weights' squares go down; as forward_logprobs."""
    total = sum(p.float().square().sum() for p in gpt.parameters())
    logprobs = -total * torch.linspace(0.5, 1.5, len(batch.rows))
    return torch.stack([logprobs, torch.zeros_like(logprobs)])


def use_bf16(set_attribute=setattr):
    """Have trainers that are made from now on hold bf16 weights, which only GPUs are given."""
    from samebit.trainer.megatron import model as model_module
    from samebit.trainer.megatron import trainer as trainer_module

    original = model_module.transformer_config

    def in_bf16(*args):
        bf16 = torch.bfloat16
        return replace(original(*args), params_dtype=bf16, pipeline_dtype=bf16, bf16=True)

    set_attribute(model_module, "transformer_config", in_bf16)
    set_attribute(trainer_module, "forward_logprobs", smooth)


def commit(trainer, digest):
    """The refusal of a receiver that holds the trainer's memory, or None."""
    weights = {name: p.detach() for name, p in trainer.params.items()}
    session = UpdateSession(trainer.specs, weights, WeightVersion(0, ""))
    session.begin(trainer.step)
    session.receive_in_place()
    try:
        session.commit(digest)
    except WeightSyncError as error:
        return str(error)
    return None


def digests(rank, size, store, folder, masters, out):
    """The trainer's digests and those of its weights at every turn, and two commits; as JSON.

    masters: "whole", or "split" over the copies of the model. Rank 1's weights are damaged.
    """
    from samebit.trainer.config import ParallelConfig

    torch.set_num_threads(1)
    start(rank, size, store)
    use_bf16()
    parallel = ParallelConfig(data=int(size), distributed_optimizer=masters == "split")
    trainer = make_trainer(folder, parallel)
    mine = trainer.own_batches(pack_samples(gradient_samples(), 50))
    found = {"masters": [], "weights": []}

    def look():
        found["masters"].append(trainer.digest())
        found["weights"].append(weights_digest(trainer.specs, trainer.params))

    look()
    for _ in range(2):
        trainer.train_step(mine, Sft())
        look()
    saved = deepcopy(trainer.state_dict())
    trainer.train_step(mine, Sft())
    trainer.load_state_dict(saved)
    look()
    found["whole"] = commit(trainer, trainer.digest())
    if int(rank) == 1:
        next(iter(trainer.params.values())).detach().view(torch.int16)[3, 2] ^= 1
    found["damaged"] = commit(trainer, trainer.digest())
    look()
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
