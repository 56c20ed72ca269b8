"""The optimizer's state in the host's memory: slices of it make the same step."""

import pytest
import torch
from helpers import assert_same_bits

from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron import trainer as trainer_module
from samebit.trainer.megatron.offload import OffloadedState
from samebit.trainer.packing import pack_samples

SETTINGS = {"weight_decay": 0.1, "lr_schedule": "linear", "lr_warmup_steps": 2}


@pytest.fixture
def batches(random_samples):
    return pack_samples(random_samples(10, seed=6), 110)


@pytest.fixture
def slices(monkeypatch):
    """Slices of 100 elements, and those that were updated."""
    from samebit.trainer.megatron import offload

    calls, original = [], offload.update

    def counting(piece, part, tensors):
        calls.append((piece.name, part))
        original(piece, part, tensors)

    monkeypatch.setattr(offload, "update", counting)
    monkeypatch.setattr(trainer_module, "OffloadedState", lambda *args: OffloadedState(*args, 100))
    return calls


@pytest.mark.parametrize("split", [False, True], ids=["whole", "distributed optimizer"])
def test_offload_moves_no_bit(make_trainer, batches, slices, split):
    """Norms, rates and weights of four steps, and a checkpoint taken over by the other kind."""

    def make(offload):
        parallel = ParallelConfig(offload_optimizer=offload, distributed_optimizer=split)
        return make_trainer(parallel=parallel, **SETTINGS)

    def steps(trainer, count):
        return [(trainer.train_step(batches, Sft()), trainer.digest()) for _ in range(count)]

    plain, offloaded = make(False), make(True)
    expected = steps(plain, 2)
    assert not slices
    assert steps(offloaded, 2) == expected
    assert len(set(slices)) == len(slices) // 2 > 20 * len(plain.params)
    ours, theirs = offloaded.state_dict(), plain.state_dict()
    assert ours["optimizer"].keys() == theirs["optimizer"].keys() == plain.params.keys()
    for name, state in theirs["optimizer"].items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert_same_bits(ours["optimizer"][name][key], state[key], (name, key))
    back, forth = make(False), make(True)
    back.load_state_dict(ours)
    forth.load_state_dict(theirs)
    expected = steps(plain, 2)
    assert steps(back, 2) == steps(forth, 2) == steps(offloaded, 2) == expected


def test_the_state_of_another_layout_is_refused(make_trainer, batches):
    """Nothing of the optimizer is written over."""
    trainer = make_trainer(**SETTINGS)
    trainer.train_step(batches, Sft())
    state = trainer.state_dict()
    name = next(iter(state["optimizer"]))
    state["optimizer"][name] = state["optimizer"][name] | {"start": 7}
    before = [t.clone() for p in trainer._pieces for t in p.tensors.values()]
    with pytest.raises(ValueError, match=f"another layout's: .*{name}"):
        trainer.load_state_dict(state)
    assert all(map(torch.equal, before, [t for p in trainer._pieces for t in p.tensors.values()]))
