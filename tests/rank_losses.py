"""Losses of whole samples on context ranks: each function is one rank's program."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from losses import SequenceRatio, policy_gradients
from policy_steps import gradient_samples
from rank_critic import critic_step, gradient_errors
from rank_programs import make_trainer, start

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import Heads
from samebit.trainer.packing import pack_samples


def made_up(samples):
    """The samples with log-probs of a rollout, and an advantage each."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for i, sample in enumerate(samples):
        logprobs = -4.0 - 3 * torch.rand(sample.num_trained, generator=generator)
        found.append(replace(sample.with_logprobs(logprobs.tolist()), advantages=0.9 - 0.4 * i))
    return found


def sums(rank, size, store, out):
    """sample_sums of this rank's share of a batch, and the gradient of a function of them."""
    from samebit.trainer.context import in_rows, sample_sums, share_context

    torch.set_num_threads(1)
    ranks = start(rank, size, store)
    [batch] = pack_samples(made_up(gradient_samples()), 1000)
    attention = CanonicalAttention(Heads(4, 2, 16, 0.25), torch.device("cpu"))
    share = share_context(batch, ranks, attention)
    values = share.batch.rollout_logprobs.clone().requires_grad_()
    found = sample_sums(values, share.batch, ranks)
    (in_rows(found.sin(), share.batch) * share.batch.advantages).sum().backward()
    saved = {"rows": share.rows, "sums": found.detach(), "grad": values.grad}
    torch.save(saved, Path(out).with_suffix(f".{rank}"))
    dist.barrier()
    dist.destroy_process_group()


def losses(rank, size, store, out):
    """This rank's rows of every policy gradient: losses, metrics, gradients by log-prob."""
    from samebit.trainer.context import share_context

    torch.set_num_threads(1)
    ranks = start(rank, size, store)
    [batch] = pack_samples(made_up(gradient_samples()), 1000, "sequence")
    attention = CanonicalAttention(Heads(4, 2, 16, 0.25), torch.device("cpu"))
    share = share_context(batch, ranks, attention)
    found = policy_gradients(share.batch, near(batch)[share.rows], ranks)
    torch.save({"rows": share.rows, "found": found}, Path(out).with_suffix(f".{rank}"))
    dist.barrier()
    dist.destroy_process_group()


def near(batch):
    """Log-probs of a batch's rows, such that ratios stand on both sides of every bound."""
    generator = torch.Generator().manual_seed(7)
    return batch.rollout_logprobs + torch.randn(len(batch.rows), generator=generator)


def referred(megatron, parallel):
    """ref_logprobs of made-up samples, by sample, under a model that is not the present one."""
    from samebit.recipes.run.batches import with_reference
    from samebit.trainer.config import TrainerConfig

    megatron.freeze_reference()
    with torch.no_grad():
        for p in megatron.params.values():
            p.mul_(1.5)
    settings = TrainerConfig(micro_batch_tokens=70, parallel=parallel)
    samples = made_up(gradient_samples())
    groups = with_reference([samples[:2], samples[2:]], settings, megatron, 0.7)
    assert [len(group) for group in groups] == [2, len(samples) - 2]
    return [s.ref_logprobs[s.loss_mask].tolist() for group in groups for s in group]


def truncated(megatron):
    """Rows of truncated samples by the weights that drew, by others, and by the reference, which
    drew; and what others find of a step on them, with the sets that are known since."""
    from samebit.trainer.algorithms.base import Algorithm, LossOutputs

    class Truncated(Algorithm):
        needs_entropy_grad = True

        def loss(self, inputs):
            # Some of the made-up tokens could not be drawn: their log-probs are -inf.
            known = inputs.logprobs.clamp(min=-50)
            return LossOutputs(-known * inputs.batch.advantages - 0.3 * inputs.entropies)

    megatron.freeze_reference()
    samples = [replace(s, thresholds=0.02 + 0 * s.logprobs) for s in made_up(gradient_samples())]
    packed = pack_samples(samples, 70, "sequence", temperature=0.7)
    batches = megatron.own_batches(packed)
    rows = [megatron.logprobs(batches)]
    batches = megatron.with_kept_sets(batches)
    with torch.no_grad():
        for p in megatron.params.values():
            p.mul_(1.5)
    rows += [megatron.logprobs(batches), megatron.logprobs(batches, reference=True)]
    stats = megatron.train_step(batches, Truncated())
    own = {b.index: [x.tolist() for x in each] for b, *each in zip(batches, *rows, strict=True)}
    return own, [stats.loss, stats.grad_norm, stats.metrics["train/entropy"]]


def preferred(megatron):
    """Loss, gradient norm and figures of a step of DPO, away from its reference."""
    from samebit.trainer.algorithms.dpo import Dpo
    from samebit.trainer.config import DpoConfig

    megatron.freeze_reference()
    with torch.no_grad():
        for p in megatron.params.values():
            p.mul_(1.5)
    samples = [replace(s, unit=i // 2) for i, s in enumerate(gradient_samples())]
    batches = megatron.own_batches(pack_samples(samples, 70, "sequence"))
    stats = megatron.train_step(batches, Dpo(DpoConfig(beta=0.5)))
    return [stats.loss, stats.grad_norm, *stats.metrics.values()]


def step(rank, size, store, folder, mode, expected, out):
    """Gradients and figures of a step by SequenceRatio, and the reference's log-probs, saved if
    alone and else compared.

    mode: "alone", or a field of ParallelConfig for two ranks.
    """
    from samebit.trainer.config import ParallelConfig
    from samebit.trainer.megatron.cpu import no_cuda
    from samebit.weight_sync.mapping import hf_tensors

    torch.set_num_threads(1)
    if mode != "alone":
        start(rank, size, store)
    layout = {} if mode == "alone" else {mode: 2}
    parallel = ParallelConfig(**layout)
    megatron = make_trainer(folder, parallel)
    packed = pack_samples(made_up(gradient_samples()), 70, "sequence", temperature=0.7)
    batches = megatron.own_batches(packed)
    with no_cuda():
        megatron._forward_backward(batches, SequenceRatio(), None)
    gradients = {name: p.main_grad.clone() for name, p in megatron.params.items()}
    figures = vars(megatron.train_step(batches, SequenceRatio()))
    figures["reference"] = referred(make_trainer(folder, parallel), parallel)
    figures["preferred"] = preferred(make_trainer(folder, parallel))
    figures["truncated"] = truncated(make_trainer(folder, parallel))
    layouts = [parallel, *([replace(parallel, sequence=True)] if mode == "tensor" else [])]
    figures["critic"] = [
        critic_step(make_trainer(folder, layout), folder, expected, mode == "alone")
        for layout in layouts
    ]
    if mode == "alone":
        torch.save({"gradients": dict(hf_tensors(megatron.specs, gradients)), **figures}, expected)
        return
    saved = torch.load(expected)
    errors = gradient_errors(megatron.specs, gradients, saved["gradients"])
    Path(out).with_suffix(f".{rank}").write_text(json.dumps({"errors": errors, **figures}))
    dist.barrier()
    dist.destroy_process_group()
