"""What a training step's forward shows: the engine's residual streams, and nothing moves for it."""

import pytest
import torch
from helpers import assert_same_bits

from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams
from samebit.trainer.algorithms.registry import make_algorithm
from samebit.trainer.config import GrpoConfig, ParallelConfig
from samebit.trainer.packing import pack_samples

LAYERS = (0, 1, 3)


class Kept:
    """Keeps what it is shown."""

    streams = LAYERS

    def __init__(self):
        self.shown = []

    def observe(self, batch, streams):
        self.shown.append((batch, {layer: stream.clone() for layer, stream in streams.items()}))


@pytest.fixture(scope="module")
def read(qwen3_path, random_samples):
    """Samples with made-up log-probs, and the engine's streams of all but their last tokens."""
    samples = random_samples(9, seed=2, with_logprobs=True)
    engine = Engine(qwen3_path, device="cpu")
    contexts = [sample.token_ids[:-1].tolist() for sample in samples]
    params = SamplingParams(temperature=0.0, max_new_tokens=1)
    done = engine.generate(contexts, params, return_hidden_states=LAYERS)
    return samples, {s.sample_id: c.hidden_states for s, [c] in zip(samples, done, strict=True)}


def params_after(trainer, samples, observer):
    """The parameters after two steps, the first of which is looked at."""
    algorithm, batches = make_algorithm(GrpoConfig()), pack_samples(samples, 100)
    trainer.observer = observer
    trainer.train_step(batches, algorithm)
    trainer.observer = None
    trainer.train_step(batches, algorithm)
    return {name: param.detach().clone() for name, param in trainer.params.items()}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_streams_are_the_engines(make_trainer, read, recompute):
    """To the bit, once for each micro-batch, of the weights before the step."""
    samples, expected = read
    kept, parallel = Kept(), ParallelConfig(recompute=recompute)
    found = params_after(make_trainer(parallel=parallel), samples, kept)
    assert len(kept.shown) == len(pack_samples(samples, 100)) > 2
    for batch, streams in kept.shown:
        assert streams.keys() == set(LAYERS)
        for layer, stream in streams.items():
            assert not stream.requires_grad
            for sample, part in zip(batch.samples, stream.split(batch.seq_lens), strict=True):
                assert_same_bits(part[:-1], expected[sample.sample_id][layer], layer)
    plain = params_after(make_trainer(parallel=parallel), samples, None)
    for name, param in plain.items():
        assert_same_bits(found[name], param, name)


def test_an_observers_error_ends_the_step(make_trainer, read):
    """Before anything is written; the hooks are gone, and later steps are as if it had not been."""

    class Failing(Kept):
        def observe(self, batch, streams):
            raise ZeroDivisionError

    samples, _ = read
    trainer = make_trainer()
    trainer.observer = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer.train_step(pack_samples(samples, 100), make_algorithm(GrpoConfig()))
    assert trainer.step == 0
    layers = trainer._chunks[0].module.decoder.layers
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    found = params_after(trainer, samples, None)
    for name, param in params_after(make_trainer(), samples, None).items():
        assert torch.equal(found[name], param)
