"""A critic's step under any layout, for programs of ranks: what one process finds is saved, what
others find is compared with it."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from policy_steps import gradient_samples
from rank_programs import make_trainer, start

from samebit.trainer.packing import pack_samples


def valued_samples():
    """With values and returns of the order of 1."""
    generator = torch.Generator().manual_seed(4)
    drawn = [(s, torch.randn(2, len(s.token_ids), generator=generator)) for s in gradient_samples()]
    return [replace(s, values=x[0].numpy(), returns=x[1].numpy()) for s, x in drawn]


def gradient_errors(specs, gradients, saved):
    """By name, how far gradients are from saved ones (Hugging Face names), relative to these."""
    from samebit.weight_sync.mapping import load_params, parts_of

    wanted = {s.name: torch.zeros(s.shape) for s in specs}
    load_params(specs, wanted, parts_of(saved.__getitem__))
    return {
        name: float((gradient - wanted[name]).norm() / (wanted[name].norm() + 1e-30))
        for name, gradient in gradients.items()
    }


def make_critic(policy, folder, **layout):
    """A critic beside the policy, whose value head is random; layout: of critic.parallel."""
    from samebit.recipes.launch.critic import fill_critic
    from samebit.rollout.models.decoder import OUTPUT
    from samebit.trainer.critic.config import CriticConfig, CriticParallelConfig
    from samebit.trainer.megatron.critic import MegatronCritic

    config = CriticConfig(parallel=CriticParallelConfig(**layout))
    critic = MegatronCritic(policy, policy.model, config, 5)
    fill_critic(critic, policy.model, folder)
    head = torch.randn(policy.model.hidden_size, generator=torch.Generator().manual_seed(5)) / 8
    with torch.no_grad():
        if OUTPUT in critic.params:
            critic.params[OUTPUT].copy_(head)
    return critic


def critic_step(policy, folder, file, alone, **layout):
    """Figures of a step, values of this rank's micro-batches, and the largest errors of gradients
    and values against those that `alone` has saved in the file."""
    from samebit.trainer.algorithms.base import Algorithm
    from samebit.trainer.megatron.cpu import no_cuda
    from samebit.weight_sync.mapping import hf_tensors

    critic = make_critic(policy, folder, **layout)
    batches = critic.own_batches(pack_samples(valued_samples(), 70))
    values = {b.index: x for b, x in zip(batches, critic.values(batches), strict=True)}
    with no_cuda():
        algorithm = Algorithm()
        critic._forward_backward(batches, algorithm, critic._references(batches, algorithm))
    gradients = {name: p.main_grad.clone() for name, p in critic.params.items()}
    stats = critic.learn(batches)
    figures = [stats.loss, stats.grad_norm, *stats.metrics.values()]
    file = Path(file).with_suffix(".critic")
    if alone:
        torch.save({"gradients": dict(hf_tensors(critic.specs, gradients)), "values": values}, file)
        return figures, {}
    saved = torch.load(file)
    errors = {}
    if not critic.parallel.distributed_optimizer:  # whose ranks have parts of the sums
        errors = gradient_errors(critic.specs, gradients, saved["gradients"])
    for index, found in values.items():
        errors[f"values {index}"] = float((found - saved["values"][index]).abs().max())
    return figures, errors


def alone(folder, file):
    """Save one process's gradients and values, and the figures of its step."""
    torch.set_num_threads(1)
    torch.save(critic_step(make_trainer(folder), folder, file, True)[0], file)


def layouts(rank, size, store, folder, beside, own, expected, out):
    """Figures and largest errors of a critic's step under each of the layouts `own`, by the keys of
    critic.parallel, in the processes of a policy whose layout is `beside`; digests of the policy,
    which steps in between, and of one that has no critic. All of it as JSON, given and found."""
    from samebit.trainer.algorithms.sft import Sft
    from samebit.trainer.config import ParallelConfig

    torch.set_num_threads(1)
    start(rank, size, store)
    parallel, own = ParallelConfig(**json.loads(beside)), json.loads(own)
    found = {"critics": [], "digests": []}
    for layouts in (own, []):
        policy = make_trainer(folder, parallel)
        batches = policy.own_batches(pack_samples(gradient_samples(), 70))
        for layout in layouts:
            found["critics"].append(critic_step(policy, folder, expected, False, **layout))
            policy.train_step(batches, Sft())
        for _ in range(len(own) - len(layouts)):
            policy.train_step(batches, Sft())
        found["digests"].append(policy.digest())
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def invariant_values(rank, size, store, folder, own, out):
    """Whether a critic's values under each of the layouts `own`, beside a tensor parallel policy
    with tp_invariant, have the bits of those under the policy's, as JSON; and of how many."""
    from samebit.recipes.run.batches import rows_by_sample
    from samebit.rollout.models.registry import load_model_config
    from samebit.trainer.config import OptimizerConfig, ParallelConfig
    from samebit.trainer.megatron.trainer import MegatronTrainer

    torch.set_num_threads(1)
    start(rank, size, store)
    parallel, cpu = ParallelConfig(tensor=int(size)), torch.device("cpu")
    policy = MegatronTrainer(
        load_model_config(folder), OptimizerConfig(), 5, cpu, parallel, tp_invariant=True
    )
    samples, found = valued_samples(), []
    for layout in ({}, *json.loads(own)):
        critic = make_critic(policy, folder, **layout)
        batches = critic.own_batches(pack_samples(samples, 70))
        found.append(rows_by_sample(batches, critic.values(batches)))
    same, count = [values == found[0] for values in found[1:]], sum(map(len, found[0].values()))
    Path(out).with_suffix(f".{rank}").write_text(json.dumps([same, count]))
    dist.barrier()
    dist.destroy_process_group()
