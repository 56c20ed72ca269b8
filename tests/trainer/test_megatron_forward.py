"""The trainer's forward gives the rollout's bits, however samples are packed."""

import random

import pytest
import torch
from helpers import assert_same_bits

from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_safetensors
from samebit.trainer.config import OptimizerConfig
from samebit.trainer.megatron.forward import ForwardModel
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.packing import pack_samples
from samebit.trainer.stats import count_mismatches

CPU = torch.device("cpu")


def by_sample(trainer, batches, **kwargs):
    """{sample id: log-probs} over all micro-batches."""
    found = {}
    for batch, logprobs in zip(batches, trainer.logprobs(batches, **kwargs), strict=True):
        lens = [s.num_trained for s in batch.samples]
        for s, part in zip(batch.samples, logprobs.split(lens), strict=True):
            found[s.sample_id] = part
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_rollout(model_path, make_trainer, rollout_samples, temperature):
    """The promise itself: the policy ratio of the first step is exactly 1."""
    trainer = make_trainer(model_path)
    samples = rollout_samples(model_path, temperature)
    packed = [
        pack_samples(samples, max_tokens, temperature=temperature)
        for max_tokens in (90, 128, 333, 10_000)
    ]
    reversed_order = pack_samples(samples[::-1], 200, temperature=temperature)
    shuffled = random.Random(1).sample(samples, len(samples))
    packed += [reversed_order, pack_samples(shuffled, 257, temperature=temperature)]
    packed.append([b for s in samples for b in pack_samples([s], 90, temperature=temperature)])
    for batches in packed:
        found = by_sample(trainer, batches)
        for s in samples:
            assert_same_bits(found[s.sample_id], torch.tensor(s.logprobs[s.loss_mask]), s.sample_id)


def test_logprobs_are_those_of_score(model_path, make_trainer, random_samples):
    """Tokens that no engine drew, by the trainer and by score, at lengths around 16 and 64."""
    samples = random_samples(12, seed=4)
    trainer, engine = make_trainer(model_path), Engine(model_path, device="cpu")
    scores = engine.score([s.token_ids.tolist() for s in samples], temperature=1.0)
    found = by_sample(trainer, pack_samples(samples, 150))
    for s, score in zip(samples, scores, strict=True):
        expected = torch.tensor(score[-s.num_trained :])
        assert_same_bits(found[s.sample_id], expected, s.sample_id)


def test_the_forward_of_training_is_the_forward_of_evaluation(
    make_trainer, qwen3_path, rollout_samples
):
    """train_step's own comparison: with gradients, every log-prob still has the rollout's bits."""
    from samebit.trainer.algorithms.grpo import Grpo

    samples = rollout_samples(qwen3_path)
    trainer = make_trainer()
    stats = trainer.train_step(pack_samples(samples, 300), Grpo())
    assert stats.logprob_tokens_compared == sum(s.num_trained for s in samples)
    assert (stats.logprob_mismatches, stats.logprob_abs_diff_max) == (0, 0.0)
    assert stats.metrics["train/ratio"] == 1.0
    assert stats.num_tokens == sum(len(s.token_ids) for s in samples)
    # On other weights the comparison must not be blind.
    stats = trainer.train_step(pack_samples(samples, 300), Grpo())
    assert stats.logprob_mismatches > 0.9 * stats.logprob_tokens_compared
    assert stats.logprob_abs_diff_max > 0


def test_mismatches_are_counted_by_bits():
    """A tolerance in the comparison would hide exactly what it is for."""
    a = torch.tensor([1.0, 0.0, torch.nan, 2.0])
    assert count_mismatches(a, a.clone()) == 0
    assert count_mismatches(a, torch.tensor([1.0, -0.0, torch.nan, 2.0])) == 1
    assert count_mismatches(a, torch.nextafter(a, torch.tensor(9.0))) == 3


def test_an_engine_bound_to_the_trainer_sees_its_steps(make_trainer, qwen3_path, rollout_samples):
    """Alias: after a step, the shared memory gives the same new bits on both sides."""
    from samebit.trainer.algorithms.sft import Sft
    from samebit.weight_sync.transports.alias import AliasLease

    samples = rollout_samples(qwen3_path)[:8]
    trainer, engine = make_trainer(), Engine(qwen3_path, device="cpu")
    engine.bind_weights(trainer.params)
    memory = {name: p.data_ptr() for name, p in trainer.params.items()}
    lease = AliasLease(engine.sink)
    before = engine.score([samples[0].token_ids.tolist()])
    for step in (1, 2):
        lease.lease(step)
        trainer.train_step(pack_samples(samples, 500), Sft())
        version = lease.update(trainer.params, trainer.digest())
        assert version.step == trainer.step == step
    assert {name: p.data_ptr() for name, p in trainer.params.items()} == memory
    assert engine.score([samples[0].token_ids.tolist()]) != before
    found = by_sample(trainer, pack_samples(samples, 500))
    for s in samples:
        [score] = engine.score([s.token_ids.tolist()])
        assert_same_bits(found[s.sample_id], torch.tensor(score[-s.num_trained :]), s.sample_id)


def test_the_forward_alone_reads_the_weights_in_place(model_path, rollout_samples):
    """No copy and no gradients, and the rollout's bits from the engine's own memory."""
    engine, samples = Engine(model_path, device="cpu"), rollout_samples(model_path)
    forward = ForwardModel(engine.model_config, engine.device, engine.weights)
    assert {name: p.data_ptr() for name, p in forward.params.items()} == {
        name: w.data_ptr() for name, w in engine.weights.items()
    }
    assert not any(p.requires_grad for p in forward.params.values())
    found = by_sample(forward, pack_samples(samples, 300))
    for s in samples:
        assert_same_bits(found[s.sample_id], torch.tensor(s.logprobs[s.loss_mask]), s.sample_id)


@pytest.mark.parametrize(("longest", "rows"), [(64, 64), (None, 1024), (10**6, 1024)])
def test_the_table_of_angles_is_as_long_as_samples_may_be(
    qwen3_path, random_samples, longest, rows
):
    """And a part of it holds the whole one's bits."""
    model, found = load_model_config(qwen3_path), []
    for bound in (longest, None):
        trainer = MegatronTrainer(model, OptimizerConfig(), 1, CPU, longest=bound)
        trainer.fill(lambda specs, params: load_safetensors(qwen3_path, specs, params))
        found.append(trainer.logprobs(pack_samples(random_samples(3, 0), 64)))
        attention = trainer._chunks[0].module.decoder.layers[0].self_attention.core_attention
        assert attention.rope_table.shape == (rows if bound == longest else 1024, 16)
    assert all(map(torch.equal, *found))
