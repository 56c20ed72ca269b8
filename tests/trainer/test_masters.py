"""bf16 weights with fp32 master copies, as on a GPU: what is rounded, and when.

The model is the smooth function of tests/rank_masters.py.
"""

from copy import deepcopy

import pytest
import torch
from helpers import assert_same_bits
from rank_masters import commit, use_bf16

from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import ParallelConfig
from samebit.trainer.packing import pack_samples
from samebit.weight_sync.digest import weights_digest

BETAS = (0.8, 0.95)
SETTINGS = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "adam_eps": 1e-4,
    "adam_beta1": BETAS[0],
    "adam_beta2": BETAS[1],
    "clip_grad": 0,
}
LAYOUTS = {
    "plain": {},
    "distributed": {"distributed_optimizer": True},
    "offloaded": {"offload_optimizer": True},
}


@pytest.fixture
def make_bf16(make_trainer, monkeypatch):
    """make_bf16(layout, ...): a trainer in bf16, which only GPUs are otherwise given."""
    use_bf16(monkeypatch.setattr)

    def make(layout="plain", **settings):
        parallel = ParallelConfig(**LAYOUTS[layout])
        return make_trainer(parallel=parallel, **(SETTINGS | settings))

    return make


@pytest.fixture
def batches(random_samples):
    return pack_samples(random_samples(5, seed=6), 100)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_go_on_from_the_masters(make_bf16, batches, layout):
    """AdamW on fp32 copies of the weights, filled ones included, rounded once a step: torch's own,
    to the bit."""
    trainer = make_bf16(layout)
    masters = {name: p.detach().float() for name, p in trainer.params.items()}
    groups = [
        {"params": [m for m in masters.values() if m.dim() > 1], "weight_decay": 0.1},
        {"params": [m for m in masters.values() if m.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-3, eps=1e-4, betas=BETAS)
    lost = 0
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in trainer.params.items()}
        trainer.train_step(batches, Sft())
        for name, p in trainer.params.items():
            assert p.dtype is torch.bfloat16
            assert p.main_grad.dtype is torch.float32
            masters[name].grad = p.main_grad.clone()
        adam.step()
        for name, p in trainer.params.items():
            assert_same_bits(p, masters[name].bfloat16(), name)
            lost += int(((p == before[name]) & (masters[name] != before[name].float())).sum())
    assert lost > 1000  # steps too small for bf16 alone: the masters keep them


def test_masters_are_part_of_the_state(make_bf16, batches):
    """A resumed run goes on from the fp32 values, not from the rounded weights; in any layout."""
    trainer = make_bf16()
    for _ in range(2):
        trainer.train_step(batches, Sft())
    saved = deepcopy(trainer.state_dict())
    assert {"master", "exp_avg", "exp_avg_sq", "step", "start"} == set(
        next(iter(saved["optimizer"].values()))
    )
    expected = [(trainer.train_step(batches, Sft()).loss, trainer.digest()) for _ in range(2)]
    for layout in LAYOUTS:
        resumed = make_bf16(layout)
        resumed.load_state_dict(saved)
        found = [(resumed.train_step(batches, Sft()).loss, resumed.digest()) for _ in range(2)]
        assert found == expected, layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_digest_is_of_the_masters(make_bf16, batches, layout):
    """Weights that were damaged behind the optimizer's back have another digest: an engine that
    holds the same memory refuses them, and takes them again once they are what was trained."""
    trainer = make_bf16(layout)
    for step in range(3):
        if step:
            trainer.train_step(batches, Sft())
        digest = trainer.digest()
        assert digest == weights_digest(trainer.specs, trainer.params)
        assert commit(trainer, digest) is None
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    bits = trainer.params[name].detach().view(torch.int16)
    bits[5, 7] ^= 1
    assert trainer.digest() == digest
    damaged = weights_digest(trainer.specs, trainer.params)
    refusal = f"update to step 2 refused: digest {damaged} here, {digest} at the sender"
    assert commit(trainer, trainer.digest()) == refusal
    bits[5, 7] ^= 1
    assert commit(trainer, trainer.digest()) is None
