"""Settings of the trainer: what is due when, and what makes no sense together."""

import pytest

from samebit.trainer.config import ParallelConfig, TrainerConfig, check_tp_invariant


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
    assert parallel.groups == (2, 3, 5, 7, 11)
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
