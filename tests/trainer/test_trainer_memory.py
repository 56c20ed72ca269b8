"""A trainer gives gradients and optimizer state back between steps; no bit of a step moves."""

from copy import deepcopy

import pytest
import torch
from helpers import assert_same_bits

from samebit.kernels.memory import ReleasedError
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.config import ParallelConfig
from samebit.trainer.packing import pack_samples


@pytest.fixture(scope="module")
def batches(random_samples):
    return pack_samples(random_samples(6, seed=6), 110)


def steps(trainer, batches, between=lambda: None):
    found = []
    for _ in range(3):
        found.append((trainer.train_step(batches, Sft()), trainer.digest()))
        between()
    return found


def gradients(trainer):
    return [buffer.grad_data for chunk in trainer._chunks for buffer in chunk.buffers]


@pytest.mark.parametrize("tags", [["gradients"], ["optimizer"], ["gradients", "optimizer"]])
@pytest.mark.parametrize("distributed", [False, True])
def test_releases_between_steps_move_no_bit(make_trainer, batches, tags, distributed):
    parallel = ParallelConfig(distributed_optimizer=distributed)
    expected = steps(make_trainer(weight_decay=0.1, parallel=parallel), batches)
    trainer = make_trainer(weight_decay=0.1, parallel=parallel, releasable=True)

    def turn():
        before = deepcopy(trainer.state_dict()["optimizer"])
        done = trainer.release_memory(tags)
        assert all(done[tag] > 0 for tag in tags)
        taken = trainer.memory_occupation()
        assert {tag: taken[tag].resident for tag in tags} == dict.fromkeys(tags, 0)
        assert trainer.release_memory(tags) == dict.fromkeys(tags, 0)
        if "gradients" in tags:
            assert not any(_inside(x).any() for x in gradients(trainer))
        assert trainer.resume_memory(tags) == done
        for name, state in trainer.state_dict()["optimizer"].items():
            for key, value in state.items():
                saved = torch.as_tensor(before[name][key])
                assert_same_bits(torch.as_tensor(value), saved, (name, key))

    assert steps(trainer, batches, turn) == expected


def _inside(tensor):
    """All but the ends, which share their pages with others."""
    assert tensor.nbytes > 4 * 4096
    return tensor[1024:-1024]


def test_the_arena_counts_what_megatron_allocated(make_trainer):
    trainer = make_trainer(releasable=True)
    grads = sum(x.nbytes for x in gradients(trainer))
    state = [x for piece in trainer._pieces for x in piece.tensors.values()]
    taken = trainer.memory_occupation()
    assert grads - 8192 * len(gradients(trainer)) < taken["gradients"].reserved <= grads
    size = sum(x.nbytes for x in state)
    assert size - 8192 * len(state) <= taken["optimizer"].reserved <= size
    assert all(found.resident == found.reserved for found in taken.values())


def test_a_trainer_without_its_memory_refuses(make_trainer, batches):
    trainer = make_trainer(releasable=True)
    digest = trainer.digest()
    trainer.release_memory(["gradients"])
    with pytest.raises(ReleasedError, match="the memory of gradients is released"):
        trainer.train_step(batches, Sft())
    state = trainer.state_dict()  # a checkpoint needs no gradients
    trainer.resume_memory(["gradients"])
    trainer.release_memory(["optimizer"])
    for work in (
        lambda: trainer.train_step(batches, Sft()),
        lambda: trainer.state_dict(),
        lambda: trainer.load_state_dict(state),
        lambda: trainer.fill(lambda specs, params: None),
        lambda: trainer.digest(),
    ):
        with pytest.raises(ReleasedError, match="the memory of optimizer is released"):
            work()
    trainer.resume_memory(["optimizer"])
    assert trainer.digest() == digest
    trainer.train_step(batches, Sft())


def test_an_offloaded_optimizer_has_nothing_to_release(make_trainer, batches):
    parallel = ParallelConfig(offload_optimizer=True)
    trainer = make_trainer(parallel=parallel, releasable=True)
    expected = steps(make_trainer(parallel=parallel), batches)

    def turn():
        done = trainer.release_memory(["gradients", "optimizer"])
        assert done["optimizer"] == 0 < done["gradients"]
        trainer.resume_memory(["gradients", "optimizer"])

    assert steps(trainer, batches, turn) == expected


def test_a_plain_trainer_refuses_and_unknown_tags_are_named(make_trainer):
    trainer = make_trainer()
    with pytest.raises(ReleasedError, match="releasable=false"):
        trainer.release_memory()
    for tags in (["weights"], "gradients"):
        with pytest.raises(ValueError, match="tags has .*; give a list of: gradients, optimizer"):
            trainer.release_memory(tags)
        with pytest.raises(ValueError, match="tags has .*; give a list of: gradients, optimizer"):
            trainer.resume_memory(tags)
