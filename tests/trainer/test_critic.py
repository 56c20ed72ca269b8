"""The critic in Megatron: values and steps against transformers in fp64, its state and memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_same_bits

from samebit.recipes.launch.critic import fill_critic
from samebit.rollout.models.decoder import OUTPUT
from samebit.rollout.models.registry import has_value_head, load_model_config
from samebit.rollout.runtime.weight_files import WeightLoadError
from samebit.trainer.config import OptimizerConfig
from samebit.trainer.critic.config import CriticConfig, CriticOptimizerConfig
from samebit.trainer.critic.value_model import VALUE_HEAD
from samebit.trainer.megatron.critic import ActorCritic, MegatronCritic
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import NonFiniteError
from samebit.weight_sync.mapping import load_params, parts_of

CPU = torch.device("cpu")


def make(path, releasable=False, **settings):
    """A policy with a critic, whose value head is random."""
    model = load_model_config(path)
    policy = ActorCritic(model, OptimizerConfig(lr=1e-2), 10, CPU, releasable=releasable)
    config = CriticConfig(optimizer=CriticOptimizerConfig(lr=1e-2, clip_grad=0.0), **settings)
    policy.critic = MegatronCritic(policy, model, config, 10)
    fill_critic(policy.critic, model, path)
    assert not policy.critic.params[OUTPUT].any()
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(1, model.hidden_size, generator=generator) / 8
    policy.critic.fill(lambda specs, params: params[OUTPUT].copy_(head))
    return policy


@pytest.fixture
def samples(random_samples):
    """With values and returns of the order of 1; one of several turns."""
    generator = np.random.default_rng(4)
    made = random_samples(6, seed=5)
    mask = made[0].loss_mask.copy()
    mask[1::3] = False
    made[0] = replace(made[0], loss_mask=mask)
    return [
        replace(s, values=generator.normal(size=n), returns=generator.normal(size=n))
        for s in made
        for n in [len(s.token_ids)]
    ]


def literal(path, head, samples, config):
    """Values of the samples' tokens, and losses, by transformers in fp64; gradients by name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    )
    head, values, losses = head.double().requires_grad_(), [], []
    for s in samples:
        hidden = model.model(torch.tensor(s.token_ids[None])).last_hidden_state[0, :-1]
        found = (hidden @ head[0])[s.loss_mask[1:]]
        old, returns = (torch.tensor(x[s.loss_mask]).double() for x in (s.values, s.returns))
        clipped = old + (found - old).clamp(-config.cliprange_value, config.cliprange_value)
        losses.append(torch.maximum((found - returns) ** 2, (clipped - returns) ** 2) / 2)
        values.append(found.detach())
    loss = torch.cat(losses).mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(values), loss.item(), grads | {VALUE_HEAD: head.grad}


def test_a_step_against_transformers(model_path, samples):
    """Whatever the family, tied or not: values, loss, and the gradient of every parameter."""
    critic = make(model_path).critic
    batches = pack_samples(samples, 60)
    assert len(batches) >= 3
    values, loss, grads = literal(
        model_path, critic.params[OUTPUT].detach(), samples, critic.config
    )
    found = torch.cat(critic.values(batches))
    assert torch.allclose(found.double(), values, rtol=1e-5, atol=1e-5)
    stats = critic.learn(batches)
    assert stats.loss == pytest.approx(loss, rel=1e-5)
    assert 0 < stats.metrics["critic/vf_clipfrac"] < 1
    assert stats.metrics["critic/vpred_mean"] == pytest.approx(float(values.mean()), abs=1e-5)
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-5)
    expected = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in critic.specs}
    load_params(critic.specs, expected, parts_of(grads.__getitem__))
    for name, p in critic.params.items():
        error = (p.main_grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, (name, float(error))
    assert torch.cat(critic.values(batches)).ne(found).any()


def save_rater(path, folder, kind="Sequence", labels=1):
    """A model of a folder with transformers' own output layer for so many labels, which is random;
    in a folder of its own."""
    import transformers

    torch.manual_seed(5)
    made = getattr(transformers, f"AutoModelFor{kind}Classification").from_pretrained(
        path, num_labels=labels, dtype=torch.float32, attn_implementation="eager"
    )
    made.save_pretrained(folder)
    return made


def test_a_reward_models_value_head_is_the_critics(model_path, samples, tmp_path):
    """Its first values are the reward model's, at every token."""
    rater = save_rater(model_path, tmp_path / "rater").double()
    assert has_value_head(tmp_path / "rater")
    assert not has_value_head(model_path)
    model = load_model_config(tmp_path / "rater", rates=True)
    policy = ActorCritic(load_model_config(model_path), OptimizerConfig(lr=1e-2), 10, CPU)
    critic = MegatronCritic(policy, model, CriticConfig(), 10)
    fill_critic(critic, model, tmp_path / "rater")
    assert critic.params[OUTPUT].any()
    found = torch.cat(critic.values(pack_samples(samples, 60)))
    with torch.no_grad():
        rated = [
            rater.score(rater.model(torch.tensor(s.token_ids[None])).last_hidden_state)[0, :-1, 0]
            for s in samples
        ]
    expected = [x[s.loss_mask[1:]] for x, s in zip(rated, samples, strict=True)]
    assert torch.allclose(found.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_output_layers_that_are_no_value_head(qwen3_path, tmp_path):
    """Of two labels; with a bias, which a critic has none of; or of the vocabulary."""
    save_rater(qwen3_path, tmp_path / "two", labels=2)
    with pytest.raises(ValueError, match="config.json: it has 2 labels .* a value head has 1"):
        load_model_config(tmp_path / "two", rates=True)
    with pytest.raises(ValueError, match="with one of the known: LlamaForSequenceClassification"):
        load_model_config(qwen3_path, rates=True)
    save_rater(qwen3_path, tmp_path / "bias", "Token")
    model = load_model_config(tmp_path / "bias", rates=True)
    policy = ActorCritic(load_model_config(qwen3_path), OptimizerConfig(lr=1e-2), 10, CPU)
    with pytest.raises(WeightLoadError, match="extra: score.bias"):
        fill_critic(MegatronCritic(policy, model, CriticConfig(), 10), model, tmp_path / "bias")


def test_the_state_of_a_policy_has_its_critics_inside(qwen3_path, samples):
    """What goes on from it goes on to the same bits."""
    batches = pack_samples(samples, 60)
    policy = make(qwen3_path)
    policy.critic.learn(batches)
    other = make(qwen3_path)
    other.load_state_dict(policy.state_dict())
    assert other.critic.step == 1
    found = [x.critic.learn(batches) for x in (policy, other)]
    assert found[0] == found[1]
    for name, p in policy.critic.params.items():
        assert_same_bits(p, other.critic.params[name], name)
    assert policy.critic.digest() == other.critic.digest()


def test_both_give_their_memory_back_together(qwen3_path, samples):
    """No bit of a step moves, and the bytes are those of both."""
    batches = pack_samples(samples, 60)
    plain, policy = make(qwen3_path), make(qwen3_path, releasable=True)
    assert policy.critic.arena is policy.arena
    for trainer in (policy, plain):
        trainer.critic.learn(batches)
    tags = ["gradients", "optimizer"]
    freed = policy.release_memory(tags)
    each = sum(p.numel() for x in (policy, policy.critic) for p in x.params.values())
    assert 0.9 * 4 * each < freed["gradients"] <= 4.2 * each
    assert policy.resume_memory(tags) == freed
    assert policy.critic.learn(batches) == plain.critic.learn(batches)
    assert policy.critic.digest() == plain.critic.digest()


def test_a_return_that_is_not_finite_is_told_as_the_critics(qwen3_path, samples):
    policy = make(qwen3_path)
    returns = np.where(samples[2].loss_mask, np.nan, 0.0)
    broken = [*samples[:2], replace(samples[2], returns=returns), *samples[3:]]
    before = policy.critic.digest()
    message = "the critic: loss is NaN or Inf at step 1, micro-batch 0, sample 102; the weights are"
    with pytest.raises(NonFiniteError, match=message):
        policy.critic.learn(pack_samples(broken, 1000))
    assert policy.critic.digest() == before
