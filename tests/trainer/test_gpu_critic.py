"""A critic beside its policy on the card: their memory leaves and comes back together."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from samebit.recipes.launch.critic import fill_critic
from samebit.recipes.launch.placement import load_weights
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import OptimizerConfig, ParallelConfig
from samebit.trainer.critic.config import CriticConfig, CriticOptimizerConfig
from samebit.trainer.megatron.critic import ActorCritic, MegatronCritic
from samebit.trainer.packing import pack_samples

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("split", [False, True], ids=["whole", "distributed optimizer"])
def test_releases_between_steps_move_no_bit(folder, random_samples, split):
    device, tags = torch.device("cuda"), ["gradients", "optimizer"]
    generator = np.random.default_rng(1)
    samples = [
        replace(s, values=np.zeros(n), returns=generator.normal(size=n))
        for s in random_samples(20, seed=6)
        for n in [len(s.token_ids)]
    ]
    batches = pack_samples(samples, 200, device=device)

    def make(releasable):
        parallel, model = ParallelConfig(distributed_optimizer=split), load_model_config(folder)
        settings = OptimizerConfig(lr=1e-3)
        policy = ActorCritic(model, settings, 9, device, parallel, releasable=releasable)
        load_weights(policy, folder)
        config = CriticConfig(optimizer=CriticOptimizerConfig(lr=1e-3), cliprange_value=0.0)
        policy.critic = MegatronCritic(policy, model, config, 9)
        fill_critic(policy.critic, model, folder)
        return policy

    def steps(policy, between=lambda: None):
        found = []
        for _ in range(4):
            stats = policy.train_step(batches, Sft()), policy.critic.learn(batches)
            found.append((stats, policy.digest(), policy.critic.digest()))
            between()
        return found, policy.critic.values(batches)

    released = make(True)
    num_params = sum(p.numel() for x in (released, released.critic) for p in x.params.values())

    def turn():
        done = released.release_memory(tags)
        assert done["gradients"] >= 4 * num_params
        assert done["optimizer"] >= 12 * num_params
        assert released.resume_memory(tags) == done

    (found, values), (expected, others) = steps(released, turn), steps(make(False))
    assert found == expected
    assert all(torch.equal(one, other) for one, other in zip(values, others, strict=True))
    losses = [stats.loss for (_, stats), *_ in found]
    assert losses[-1] < losses[0]
