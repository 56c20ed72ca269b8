"""Data parallel training: the gradients of one process, and copies that stay one model."""

import json

import pytest
import torch
from policy_steps import assert_same_figures


@pytest.fixture(scope="module")
def alone(run_together, qwen3_path, tmp_path_factory):
    """What one process with all micro-batches comes to."""
    folder = tmp_path_factory.mktemp("alone")
    run_together("data", [(0, 1, folder / "store", qwen3_path, "whole", folder / "out.pt")])
    return torch.load(folder / "out.0")


@pytest.mark.parametrize("distributed", ["whole", "split", "whole overlap", "split overlap"])
def test_two_copies_train_one_model(run_ranks, qwen3_path, alone, distributed, tmp_path):
    """Each on its own micro-batches; with the optimizer's state split over them or not, and with
    gradients summed up during the backward or after it."""
    run_ranks("data", 2, qwen3_path, distributed, tmp_path / "out.pt")
    found = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    assert sum(f["num_batches"] for f in found) == alone["num_batches"] > 3
    assert found[0]["digest"] == found[1]["digest"]
    assert found[0]["stats"] == found[1]["stats"]
    assert found[0]["nll"] == found[1]["nll"] == pytest.approx(alone["nll"], rel=1e-12)
    for ours, theirs in zip(found[0]["stats"], alone["stats"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "grad_norm", "num_tokens", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-6)
    assert found[0]["policy"] == found[1]["policy"]
    assert_same_figures(found[0]["policy"], alone["policy"])
    said = [
        "loss is NaN or Inf at step 3, micro-batch 1, sample 2; the weights are unchanged",
        *["a gradient is NaN or Inf at step 3; the weights are unchanged"] * 2,
    ]
    for f in found:
        assert f["refused"] == [(line, True) for line in said]
        count, unequal = f["compared"]
        assert count > 100
        assert unequal == 0
    for name, expected in alone["gradients"].items():
        if "whole" in distributed:  # else each rank has the sum of its own part alone
            error = (found[0]["gradients"][name] - expected).norm() / expected.norm()
            assert error < 1e-6, name
        drift = (found[0]["params"][name] - alone["params"][name]).abs().max()
        assert drift < 1e-5, name  # two steps of at most 1e-3 an element


@pytest.mark.parametrize("masters", ["whole", "split"])
def test_masters_of_all_ranks_are_one_digest(run_ranks, qwen3_path, masters, tmp_path):
    """That of each rank's gathered weights; damage on one rank is told to that rank's engine."""
    run_ranks("rank_masters.digests", 2, qwen3_path, masters, tmp_path / "out.json")
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    *whole, damaged = second.pop("weights")
    assert first["masters"] == first["weights"] == second["masters"]
    start, one, two, loaded, last = first["weights"]
    assert whole == [start, one, two, loaded]
    assert len({start, one, two}) == 3
    assert two == loaded == last != damaged
    assert first["whole"] is second["whole"] is first["damaged"] is None
    refusal = f"update to step 2 refused: digest {damaged} here, {last} at the sender"
    assert second["damaged"] == refusal
