"""Activations computed again in the backward: the same bits, and work that is really done twice."""

import pytest

from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron import spec
from samebit.trainer.packing import pack_samples


@pytest.fixture
def activations(monkeypatch):
    """Shapes that the MLPs' activation was computed of."""
    calls = []
    original = spec.swiglu

    def counting(x):
        calls.append(x.shape)
        return original(x)

    monkeypatch.setattr(spec, "swiglu", counting)
    return calls


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_moves_no_bit(make_trainer, model_path, random_samples, activations, recompute):
    """Losses, norms and weights of two steps; every layer's MLP ran once more in the backward."""
    batches = pack_samples(random_samples(10, seed=6), 110)
    found = []
    for how in ("none", recompute):
        activations.clear()
        trainer = make_trainer(model_path, parallel=ParallelConfig(recompute=how))
        stats = [trainer.train_step(batches, Sft()) for _ in range(2)]
        found.append((stats, trainer.digest(), len(activations)))
    assert found[0][:2] == found[1][:2]
    assert found[1][2] == 2 * found[0][2] > 0


def test_unknown_recompute_is_refused():
    with pytest.raises(ValueError, match=r"trainer\.parallel\.recompute is 'some'; it must be one"):
        ParallelConfig(recompute="some")
