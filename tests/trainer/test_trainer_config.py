"""Settings of the trainer: what is due when, and what makes no sense together."""

import math

import pytest

from samebit.rollout.models.registry import load_model_config
from samebit.trainer.algorithms.rloo import RlooConfig
from samebit.trainer.config import (
    GrpoConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainerConfig,
    check_tp_invariant,
)
from samebit.trainer.megatron.stages import make_stage


def test_checkpoints_are_due():
    """Every so many steps and after the last; 0: after the last alone."""
    every = TrainerConfig(num_steps=7, checkpoint_every=3)
    assert [step for step in range(1, 8) if every.checkpoint_due(step)] == [3, 6, 7]
    last = TrainerConfig(num_steps=7, checkpoint_every=0)
    assert [step for step in range(1, 8) if last.checkpoint_due(step)] == [7]


def test_processes_of_a_layout():
    parallel = ParallelConfig(tensor=2, pipeline=3, context=5, data=7, virtual_pipeline=11)
    assert parallel.num_processes == 2 * 3 * 5 * 7
    assert parallel.layout == (2, 3, 5, 7)
    assert str(parallel) == "tensor x pipeline x context x data = 2 x 3 x 5 x 7"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": 0}, r"trainer\.parallel\.data is 0; it must be at least 1"),
        ({"sequence": True}, r"parallel\.sequence is True; .* where .*tensor is 1"),
        ({"virtual_pipeline": 2}, r"virtual_pipeline is 2; it must be 1 where .*pipeline is 1"),
        ({"overlap_grad_reduce": True}, r"overlap_grad_reduce is True; .*data and context are 1"),
        ({"tensor": 2, "sequence": True, "context": 2}, r"context is 2; it must be 1 with .*sequ"),
    ],
)
def test_layouts_that_make_no_sense_name_their_key(settings, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "name", "refused", "taken"),
    [
        (OptimizerConfig, "lr", [-1e-9, math.inf, math.nan], [0.0]),
        (OptimizerConfig, "lr_warmup_steps", [-1], [0]),
        (OptimizerConfig, "weight_decay", [-1e-9], [0.0]),
        (OptimizerConfig, "clip_grad", [-1e-9], [0.0]),
        (OptimizerConfig, "adam_beta1", [-0.1, 1.0], [0.0, 0.999]),
        (OptimizerConfig, "adam_beta2", [-0.1, 1.0], [0.0, 0.999]),
        (OptimizerConfig, "adam_eps", [0.0, -1e-9], [1e-30]),
        (GrpoConfig, "clip_ratio_low", [-0.1, 1.1], [0.0, 1.0]),
        (GrpoConfig, "clip_ratio_high", [-0.1], [0.0, 3.0]),
        (GrpoConfig, "kl_coef", [-0.1, math.inf], [0.0]),
        (GrpoConfig, "entropy_coef", [-0.1, math.nan], [0.0, 0.5]),
        (GrpoConfig, "dual_clip", [-1.0, 1.2, math.inf], [0.0, 1.25]),
        (GrpoConfig, "tis_clip", [-1.0, 1.2, math.inf], [0.0, 1.25]),
        (RlooConfig, "tis_clip", [0.9, math.inf], [0.0, 1.0]),
        (GrpoConfig, "std_eps", [-0.1], [0.0]),
        (TrainerConfig, "num_steps", [0], [1]),
        (TrainerConfig, "batch_size", [0], [1, None]),
        (TrainerConfig, "micro_batch_tokens", [0], [1]),
        (TrainerConfig, "keep_checkpoints", [0], [1]),
        (TrainerConfig, "checkpoint_every", [-1], [0]),
    ],
)
def test_edges_of_every_number(kind, name, refused, taken):
    """The last value that is taken and the first that is not."""
    for value in taken:
        assert getattr(kind(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=rf"\.{name} is {value!r}; it must be "):
            kind(**{name: value})


def test_chunks_of_stages_share_the_layers_too(llama_path):
    """Three layers on one stage: three chunks of one, never two."""
    model = load_model_config(llama_path)
    assert make_stage(model, 0, 1, 3).num_layers == 1
    with pytest.raises(ValueError, match="virtual_pipeline = 1 x 2; it must divide the model's 3"):
        make_stage(model, 0, 1, 2)


def test_layouts_that_make_sense():
    """One step beside those refused."""
    ParallelConfig(tensor=2, sequence=True)
    ParallelConfig(pipeline=2, virtual_pipeline=2)
    ParallelConfig(context=2, overlap_grad_reduce=True)
    ParallelConfig(data=2, overlap_grad_reduce=True)
    for size in (1, 2, 4, 8):
        check_tp_invariant(True, size, "key")
    check_tp_invariant(False, 3, "key")
    for size in (3, 16):
        with pytest.raises(ValueError, match=f"key is {size}; it must be 1, 2, 4 or 8"):
            check_tp_invariant(True, size, "key")
