"""Losses of whole samples on context ranks: each function is one rank's program."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from losses import policy_gradients
from policy_steps import gradient_samples
from rank_critic import critic_step, gradient_errors
from rank_programs import make_trainer, start

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import Heads
from samebit.kernels.top_tokens import top_tokens
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


def cases():
    """Every algorithm with an entropy in its loss, by name; grpo with a KL in it too, cispo with
    masked samples, gspo with one gradient for each token, distillation by the teacher's likeliest;
    dpo, which has pairs; and sft."""
    from samebit.trainer.algorithms.dpo import Dpo
    from samebit.trainer.algorithms.registry import ALGORITHMS, find_algorithm
    from samebit.trainer.algorithms.sft import Sft
    from samebit.trainer.config import DpoConfig

    settings = {name: {} for name in ALGORITHMS} | {"gspo_token": {"token_level": True}}
    settings |= {"grpo": {"kl_coef": 0.1}, "distillation_top_k": {"loss_top_k": 4}}
    settings |= {"cispo": {"off_policy_mask_threshold": 0.1}}
    found = {}
    for key, own in settings.items():
        name = {"gspo_token": "gspo", "distillation_top_k": "distillation"}.get(key, key)
        algorithm = find_algorithm(name)
        found[key] = algorithm(algorithm.Config(name=name, entropy_coef=0.3, **own))
    return found | {"dpo": Dpo(DpoConfig(beta=0.5)), "sft": Sft()}


MEANS = {"sft": ("token", None), "rloo": ("token", None), "grpo": ("constant", 8)}
"""Of the loss, where it is not the mean over samples."""


def rated_samples():
    """Two samples of each of three prompts, with what critic and teacher say of them."""
    found = made_up([replace(s, unit=i // 2) for i, s in enumerate(gradient_samples())])
    generator = torch.Generator().manual_seed(8)
    for i, sample in enumerate(found):
        values, teacher = torch.randn(2, len(sample.token_ids), generator=generator).numpy()
        teacher_logprobs = sample.logprobs + teacher
        found[i] = replace(sample, values=values, teacher_logprobs=teacher_logprobs)
    return [found[:2], found[2:4], found[4:]]


def with_top(sample, k):
    """The sample with likeliest tokens of a made-up teacher."""
    generator = torch.Generator().manual_seed(sample.sample_id)
    logits = 2 * torch.randn(sample.num_trained, 331, generator=generator)
    return replace(sample, teacher_top=top_tokens(logits, k))


def algorithm_steps(megatron):
    """Gradients and figures of a step of each algorithm, from rewards on; no weight is moved."""
    from samebit.recipes.data.samples import with_advantages

    megatron.freeze_reference()
    with torch.no_grad():
        for p in megatron.params.values():
            p.mul_(1.5)
    groups = rated_samples()
    rewards = torch.tensor([[1.0, 0.0], [0.5, 2.0], [-1.0, 0.25]], dtype=torch.float64)
    gradients, figures = {}, {}
    for name, algorithm in cases().items():
        samples = [sample for group in groups for sample in group]
        if name not in ("dpo", "sft"):
            samples = with_advantages(groups, algorithm.advantages(rewards, groups))
        if algorithm.teacher_top_k:
            samples = [with_top(sample, algorithm.teacher_top_k) for sample in samples]
        mean, tokens = MEANS.get(name, ("sequence", None))
        packed = pack_samples(samples, 70, mean, loss_mean_tokens=tokens, temperature=0.7)
        figures[name] = vars(megatron.train_step(megatron.own_batches(packed), algorithm))
        gradients[name] = {key: p.main_grad.clone() for key, p in megatron.params.items()}
    return gradients, figures


def step(rank, size, store, folder, mode, expected, out):
    """Gradients and figures of a step of every algorithm, and the reference's log-probs, saved if
    alone and else compared.

    mode: "alone", or a field of ParallelConfig for two ranks.
    """
    from samebit.trainer.config import ParallelConfig
    from samebit.weight_sync.mapping import hf_tensors

    torch.set_num_threads(1)
    if mode != "alone":
        start(rank, size, store)
    layout = {} if mode == "alone" else {mode: 2}
    parallel = ParallelConfig(**layout)
    megatron = make_trainer(folder, parallel, lr=0.0, clip_grad=0.0)
    gradients, steps = algorithm_steps(megatron)
    figures = {"steps": steps, "reference": referred(make_trainer(folder, parallel), parallel)}
    figures["truncated"] = truncated(make_trainer(folder, parallel))
    layouts = [parallel, *([replace(parallel, sequence=True)] if mode == "tensor" else [])]
    figures["critic"] = [
        critic_step(make_trainer(folder, layout), folder, expected, mode == "alone")
        for layout in layouts
    ]
    if mode == "alone":
        whole = {name: dict(hf_tensors(megatron.specs, x)) for name, x in gradients.items()}
        torch.save({"gradients": whole, **figures}, expected)
        return
    saved = torch.load(expected)["gradients"]
    figures["errors"] = {
        name: gradient_errors(megatron.specs, found, saved[name])
        for name, found in gradients.items()
    }
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()
