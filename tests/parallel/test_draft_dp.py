"""A draft trained by several ranks: equal bits on all, summed in rank order; of a target that
tensor parallel ranks share, the bits of one that is whole."""

import pytest
import torch
from draft_cases import make_config
from draft_training import make_batches, make_trainer
from helpers import assert_same_bits
from rank_draft import LONG

from samebit.trainer.packing import share_batches


@pytest.fixture(scope="module")
def found(run_together, tmp_path_factory):
    """What each rank holds after two steps, and what it has told."""
    folder = tmp_path_factory.mktemp("draft")
    calls = [(rank, 3, folder / "store", folder / "out") for rank in range(3)]
    run_together("rank_draft.train", calls)
    return [torch.load(folder / f"out.{rank}", weights_only=False) for rank in range(3)]


def test_all_ranks_hold_the_same_draft(found):
    for own in found[1:]:
        assert own["stats"] == found[0]["stats"]
        for name, param in found[0]["params"].items():
            assert_same_bits(own["params"][name], param, name)


def test_gradients_are_summed_in_rank_order(found):
    """One process that adds each rank's sums in that order takes the very same steps."""
    config = make_config()
    trainer = make_trainer(config, passes=2)
    grads = trainer._grads
    take = trainer.take

    def by_rank(shares):
        sums = {name: torch.zeros_like(grad) for name, grad in grads.items()}
        for share in shares:
            for grad in grads.values():
                grad.zero_()
            for data in share:
                take(data)
            for name, grad in grads.items():
                sums[name] += grad
        for name, grad in grads.items():
            grad.copy_(sums[name])

    trainer.take = by_rank
    for number in range(2):
        shares = share_batches(make_batches(config, LONG, number, max_tokens=30), 3)
        stats = trainer.train_step([shares])
        assert found[0]["stats"][number]["grad_norm"] == stats.grad_norm
        assert found[0]["stats"][number]["num_rows"] == stats.num_rows
        assert found[0]["stats"][number]["loss"] == pytest.approx(stats.loss, rel=1e-14)
    for name, param in trainer.params.items():
        assert_same_bits(param, found[0]["params"][name], name)


def test_a_target_in_shards_trains_the_same_draft(run_ranks, tmp_path):
    """Each of its ranks trains the whole draft, by a part of embedding and output layer."""
    run_ranks("rank_draft.train_by_shards", 2, tmp_path / "out")
    trainer = make_trainer(make_config(), passes=2)
    stats = [
        trainer.train_step(make_batches(trainer.config, LONG, number, max_tokens=30))
        for number in range(2)
    ]
    for rank in range(2):
        found = torch.load(tmp_path / f"out.{rank}", weights_only=False)
        assert found["stats"] == [vars(own) for own in stats]
        for name, param in trainer.params.items():
            assert_same_bits(found["params"][name], param, name)
