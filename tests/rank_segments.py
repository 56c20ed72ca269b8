"""Optimizer steps with gradient segments: each function is one rank's program."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from policy_steps import gradient_samples
from rank_losses import made_up
from rank_programs import start

from samebit.trainer.packing import pack_samples

SEGMENTS = 4
STEPS = 4


def make_trainer(folder, parallel, **settings):
    """A trainer with segments whose every step clips."""
    from samebit.recipes.launch.placement import load_weights
    from samebit.rollout.models.registry import load_model_config
    from samebit.trainer.config import OptimizerConfig
    from samebit.trainer.megatron.trainer import MegatronTrainer

    optimizer = OptimizerConfig(lr=1e-2, lr_schedule="linear", weight_decay=0.1, clip_grad=0.1)
    settings = {"grad_segments": SEGMENTS} | settings
    model, device = load_model_config(folder), torch.device("cpu")
    megatron = MegatronTrainer(model, optimizer, 5, device, parallel, **settings)
    load_weights(megatron, folder)
    return megatron


def take_step(megatron):
    """The step that comes next: SFT, in segments of one sample and of two; GRPO with a reference;
    DPO of three pairs, which leave a segment empty; SFT of two samples, which leave two so."""
    from samebit.trainer.algorithms.dpo import Dpo
    from samebit.trainer.algorithms.grpo import Grpo
    from samebit.trainer.algorithms.sft import Sft
    from samebit.trainer.config import DpoConfig, GrpoConfig

    samples = gradient_samples()
    pairs = [replace(s, unit=i // 2) for i, s in enumerate(samples)]
    kinds = [
        (samples, "token", Sft()),
        (made_up(samples), "sequence", Grpo(GrpoConfig(kl_coef=0.3))),
        (pairs, "sequence", Dpo(DpoConfig(beta=0.5))),
        (samples[:2], "token", Sft()),
    ]
    given, mean, algorithm = kinds[megatron.step]
    count = megatron.grad_segments or 1
    batches = megatron.own_batches(pack_samples(given, 64, mean, num_segments=count))
    return len(batches), vars(megatron.train_step(batches, algorithm))


def go_on(rank, size, store, folder, layout, before, after, until, out):
    """From the checkpoint in `before`, if there is one, of any layout, to the step `until`; then a
    checkpoint in `after`. What each step came to, as JSON.

    layout: JSON of fields of ParallelConfig, and grad_segments where it is not SEGMENTS.
    """
    from samebit.trainer.checkpoint import latest_checkpoint
    from samebit.trainer.checkpoint_writer import CheckpointWriter
    from samebit.trainer.config import ParallelConfig
    from samebit.trainer.megatron.resharding import WholeState

    torch.set_num_threads(1)
    if int(size) > 1:
        start(rank, size, store)
    fields = json.loads(layout)
    own = {key: fields.pop(key) for key in ("grad_segments", "tp_invariant") if key in fields}
    megatron = make_trainer(folder, ParallelConfig(**fields), **own)
    megatron.freeze_reference()
    if (saved := latest_checkpoint(Path(before))) is not None:
        megatron.load_resharded(WholeState(megatron.model, saved.load_all()))
    steps, counts = {}, []
    while megatron.step < int(until):
        count, stats = take_step(megatron)
        counts.append(count)
        steps[megatron.step] = [megatron.digest(), stats]
    few = megatron.own_batches(pack_samples(gradient_samples()[:3], 64, num_segments=SEGMENTS))
    found = {"steps": steps, "counts": counts, "nll": megatron.mean_nll(few)}
    writer = CheckpointWriter(Path(after), keep=1, background=False)
    writer.save(megatron.step, megatron.state_dict(), {})
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    if int(size) > 1:
        dist.barrier()
        dist.destroy_process_group()
