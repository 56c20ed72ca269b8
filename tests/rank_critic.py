"""A critic's step under any layout, for programs of ranks: what one process finds is saved, what
others find is compared with it."""

from dataclasses import replace
from pathlib import Path

import torch
from policy_steps import gradient_samples

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


def make_critic(policy, folder):
    """A critic beside the policy, whose value head is random."""
    from samebit.recipes.launch.critic import fill_critic
    from samebit.rollout.models.decoder import OUTPUT
    from samebit.trainer.critic.config import CriticConfig
    from samebit.trainer.megatron.critic import MegatronCritic

    critic = MegatronCritic(policy, policy.model, CriticConfig(), 5)
    fill_critic(critic, policy.model, folder)
    head = torch.randn(policy.model.hidden_size, generator=torch.Generator().manual_seed(5)) / 8
    with torch.no_grad():
        if OUTPUT in critic.params:
            critic.params[OUTPUT].copy_(head)
    return critic


def critic_step(policy, folder, file, alone):
    """Figures of a step, values of this rank's micro-batches, and the largest errors of gradients
    and values against those that `alone` has saved in the file."""
    from samebit.trainer.algorithms.base import Algorithm
    from samebit.trainer.megatron.cpu import no_cuda
    from samebit.weight_sync.mapping import hf_tensors

    critic = make_critic(policy, folder)
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
    errors = gradient_errors(critic.specs, gradients, saved["gradients"])
    for index, found in values.items():
        errors[f"values {index}"] = float((found - saved["values"][index]).abs().max())
    return figures, errors
