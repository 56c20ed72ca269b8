"""Tensor, sequence and context parallel training: the rollout's bits, one process's gradients."""

import json

import pytest
from policy_steps import assert_same_figures

from samebit.recipes.models.tiny_model import make_random_model
from samebit.rollout.engine import Engine


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request, tmp_path_factory):
    """Qwen3 with an output layer of its own, of whose vocabulary the second rank holds nothing but
    padding, and Llama with tied embeddings, of which both hold a part.

    Split layers sum in another order; weights of the usual initial scale do not blow that up.
    """
    folder = tmp_path_factory.mktemp("models") / request.param
    shape = {"tied": True, "vocab_size": 900} if request.param == "llama" else {"tied": False}
    make_random_model(folder, request.param, seed=1, std=0.02, **shape)
    return folder


@pytest.mark.parametrize("mode", ["tensor", "sequence", "context"])
def test_two_ranks_train_one_model(run_ranks, folder, gradients, mode, tmp_path):
    """No log-prob differs from the rollout's before or after training, every gradient and the norm
    are those of the whole model, and both ranks agree on the weights that come out."""
    file, norm = gradients
    run_ranks("trainer", 2, folder, mode, file, tmp_path / "out.json")
    first, second = (json.loads((tmp_path / f"out.{r}").read_text()) for r in range(2))
    assert first["compared"] > 300
    for found in (first, second):
        assert (found["unequal"], found["unequal_after"]) == (0, 0)
        assert max(found["errors"].values()) < 1e-6, found["errors"]
        assert max(found["policy_errors"].values()) < 1e-5, found["policy_errors"]
        assert_same_figures(found["stats"], found["stats_alone"])
        assert found["norms"][0] == pytest.approx(norm, rel=1e-6)
        assert found["nll"] == pytest.approx(found["nll_alone"], rel=1e-6)
    assert first["norms"] == second["norms"]
    assert first["trained"] == second["trained"]
    alone = Engine(folder, device="cpu").weight_version.digest
    assert {*first["digests"], *second["digests"]} == {alone}
    assert first["trained"] != alone
