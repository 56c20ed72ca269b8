"""Draft training in bf16 with fp32 masters, resumed from checkpoints to the same bytes."""

import pytest
import torch
from draft_cases import OPTIONS, make_config
from draft_training import make_batches, make_trainer
from helpers import assert_same_bits

from samebit.rollout.models.draft.config import EMBEDDING
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.trainer.checkpoint_writer import CheckpointWriter
from samebit.trainer.config import OptimizerConfig
from samebit.trainer.draft.optimizer import MasterAdamW, learning_rate
from samebit.trainer.types import NonFiniteError

OWN = {"owns_embedding": True, "fc_norm": True}


def step_of(trainer, number):
    return trainer.train_step(make_batches(trainer.config, seed=number, max_tokens=30))


@pytest.mark.parametrize("options", [OWN, OPTIONS["block"]], ids=["chain", "block"])
def test_a_resumed_run_takes_the_same_steps(tmp_path, options):
    """By way of a checkpoint on disk, at any step, under a schedule of the learning rate."""
    config, settings = (
        make_config(**options),
        {"passes": 2, "lr_schedule": "cosine", "weight_decay": 0.1},
    )
    trainer = make_trainer(config, **settings)
    writer = CheckpointWriter(tmp_path, keep=9)
    stats = []
    for number in range(4):
        writer.save(number, trainer.state_dict(), {})
        stats.append(step_of(trainer, number))
    writer.save(4, trainer.state_dict(), {})
    writer.finish()
    for number in (0, 3):
        resumed = make_trainer(config, seed=9, **settings)
        step_of(resumed, 7)
        state = latest_checkpoint(tmp_path).path.with_name(f"step_{number:08d}")
        resumed.load_state_dict(torch.load(state / "rank_00000.pt", weights_only=True))
        assert [step_of(resumed, n) for n in range(number, 4)] == stats[number:]
        for name, param in trainer.params.items():
            assert_same_bits(resumed.params[name], param, name)
        other = CheckpointWriter(tmp_path / "resumed", keep=1)
        other.save(4, resumed.state_dict(), {})
        other.finish()
        files = [latest_checkpoint(path).manifest["files"] for path in (tmp_path, other._root)]
        assert files[0] == files[1]


def test_moments_are_there_from_the_start():
    """Neither a step nor a state that is loaded, nor what it is filled with, allocates others. A
    state that was saved without any is of the start."""
    trainer = make_trainer(make_config(**OWN), passes=2)
    state = trainer.state_dict()
    first = {name: dict(own) for name, own in state["optimizer"].items()}
    assert not any(own[key].any() for own in first.values() for key in ("step", "exp_avg_sq"))
    unstepped = {
        **state,
        "params": {name: p.clone() for name, p in state["params"].items()},
        "optimizer": {n: {"master": own["master"].clone()} for n, own in first.items()},
    }
    begin = {name: param.clone() for name, param in trainer.params.items()}
    step_of(trainer, 0)
    stepped = {name: param.clone() for name, param in trainer.params.items()}
    for again in (
        lambda: trainer.load_state_dict(unstepped),
        lambda: trainer.fill(lambda params: [params[n].copy_(p) for n, p in begin.items()]),
    ):
        step_of(trainer, 1)
        again()
        step_of(trainer, 0)
        for name, param in trainer.params.items():
            assert_same_bits(param, stepped[name], name)
    for name, own in trainer.state_dict()["optimizer"].items():
        assert set(own) == {"master", "step", "exp_avg", "exp_avg_sq"}
        for key, tensor in own.items():
            assert tensor.data_ptr() == first[name][key].data_ptr(), (name, key)


def test_a_state_of_another_draft_is_refused():
    state = make_trainer(make_config(), passes=1).state_dict()
    trainer = make_trainer(make_config(ffn_size=48), passes=1)
    message = r"draft.layers.0.mlp.linear_fc1.weight is \(80, 24\) there, \(96, 24\) here"
    with pytest.raises(ValueError, match=message):
        trainer.load_state_dict(state)


def test_nothing_is_written_for_a_gradient_that_is_none():
    config = make_config()
    trainer = make_trainer(config, passes=1)
    [data] = make_batches(config)
    data.streams[4][30] = float("inf")
    before = {name: param.detach().clone() for name, param in trainer.params.items()}
    with pytest.raises(
        NonFiniteError, match="the draft: loss nan and gradient norm nan at its step"
    ):
        trainer.train_step([data])
    for name, param in trainer.params.items():
        assert_same_bits(param, before[name], name)
    assert trainer.step == 0


def test_gradients_are_clipped_by_their_norm():
    """Two trainers differ by the clip alone: the clipped one's moments are the others', scaled."""
    config = make_config()
    free = make_trainer(config, passes=2, clip_grad=0.0)
    clipped = make_trainer(config, passes=2, clip_grad=0.01)
    norm = step_of(free, 0).grad_norm
    assert step_of(clipped, 0).grad_norm == norm > 0.01
    states = [trainer.state_dict()["optimizer"] for trainer in (free, clipped)]
    for name, state in states[0].items():
        scaled = state["exp_avg"] * (0.01 / norm)
        torch.testing.assert_close(states[1][name]["exp_avg"], scaled, rtol=1e-5, atol=0)


def test_an_embedding_of_its_own_stays_as_it_was():
    trainer = make_trainer(make_config(**OWN), passes=1)
    before = trainer.params[EMBEDDING].clone()
    step_of(trainer, 0)
    assert_same_bits(trainer.params[EMBEDDING], before)
    assert EMBEDDING not in trainer.state_dict()["optimizer"]


def test_masters_keep_what_bf16_rounds_away():
    """Steps far below an ulp of the parameters add up in the masters."""
    config = OptimizerConfig(lr=1e-3, adam_eps=1e-12)
    params = torch.ones(3, 4, dtype=torch.bfloat16)
    master = params.float()
    adam = MasterAdamW({"w": master}, config)
    for _ in range(9):
        adam.step({"w": torch.full((3, 4), 1e-6)}, lr=1e-3)
        params.copy_(master)
    expected = torch.tensor(1 - 9e-3).bfloat16()
    assert_same_bits(params, expected.expand(3, 4).contiguous())
    one_by_one = torch.ones((), dtype=torch.bfloat16)
    for _ in range(9):
        one_by_one -= 1e-3
    assert one_by_one == 1


def test_learning_rates_by_hand():
    linear = OptimizerConfig(lr=8.0, min_lr=2.0, lr_schedule="linear", lr_warmup_steps=2)
    assert [learning_rate(linear, i, 5) for i in range(6)] == [4.0, 8.0, 8.0, 5.0, 2.0, 2.0]
    cosine = OptimizerConfig(lr=8.0, lr_schedule="cosine")
    assert [round(learning_rate(cosine, i, 3), 9) for i in range(3)] == [8.0, 4.0, 0.0]
    assert learning_rate(OptimizerConfig(lr=8.0), 99, 5) == 8.0
