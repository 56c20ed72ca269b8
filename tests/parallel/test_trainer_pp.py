"""Pipeline parallel training: the rollout's bits, one process's gradients, resumed exactly."""

import json

import pytest
import torch
from policy_steps import assert_same_figures

from samebit.recipes.models.tiny_model import write_config, write_weights
from samebit.rollout.engine import Engine

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "head_dim": 16,
    "vocab_size": 700,  # of 1,024 with padding: two tensor ranks have both their share
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}


def make_model(folder, architecture, tied):
    """Two layers a stage; weights of the usual initial scale."""
    write_config(folder, architecture, **SHAPE, tie_word_embeddings=tied)
    write_weights(folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def qwen3_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tied=False)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request, qwen3_folder):
    """Llama's tied embedding is on both stages."""
    if request.param == "qwen3":
        return qwen3_folder
    return make_model(qwen3_folder.with_name("llama"), "llama", tied=True)


@pytest.mark.parametrize("mode", ["pipeline", "virtual_pipeline"])
def test_two_stages_train_one_model(run_ranks, folder, gradients, mode, tmp_path):
    """No log-prob differs from the single-process rollout's before or after training, every
    gradient and the norm are those of the whole model, and both stages know the same digest."""
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
    assert first["errors"].keys() != second["errors"].keys()
    assert first["norms"] == second["norms"]
    assert first["trained"] == second["trained"]
    alone = Engine(folder, device="cpu").weight_version.digest
    assert {*first["digests"], *second["digests"]} == {alone}
    assert first["trained"] != alone


@pytest.fixture(scope="module")
def qwen3_gradients(run_gradients, qwen3_folder, tmp_path_factory):
    """What one process comes to."""
    file = tmp_path_factory.mktemp("gradients") / "qwen3.pt"
    run_gradients(qwen3_folder, file)
    return file


@pytest.mark.long
@pytest.mark.parametrize(
    "mode", ["tensor+context", "tensor+data", "pipeline+sequence", "pipeline+context"]
)
def test_four_ranks_train_one_model(run_ranks, qwen3_gradients, qwen3_folder, mode, tmp_path):
    """Two kinds of parallelism at once: the same as each of them."""
    run_ranks("trainer", 4, qwen3_folder, mode, qwen3_gradients, tmp_path / "out.json")
    found = [json.loads((tmp_path / f"out.{r}").read_text()) for r in range(4)]
    for rank in found:
        assert rank["compared"] > 300
        assert (rank["unequal"], rank["unequal_after"]) == (0, 0)
        assert max(rank["errors"].values()) < 1e-6, rank["errors"]
        assert max(rank["policy_errors"].values()) < 1e-5, rank["policy_errors"]
        assert_same_figures(rank["stats"], rank["stats_alone"])
        assert rank["norms"] == found[0]["norms"]
        assert rank["norms"][0] == pytest.approx(torch.load(qwen3_gradients)["norm"], rel=1e-6)
    alone = Engine(qwen3_folder, device="cpu").weight_version.digest
    assert {d for rank in found for d in rank["digests"]} == {alone}
    assert len({rank["trained"] for rank in found} | {alone}) == 2


@pytest.mark.parametrize("mode", ["pipeline", "virtual_pipeline"])
def test_two_stages_resume_to_the_same_bytes(run_ranks, folder, mode, tmp_path):
    """Each stage's state in a file of its own."""
    run_ranks("resume", 2, folder, mode, tmp_path / "checkpoints", tmp_path / "out.json")
    for rank in range(2):
        found = json.loads((tmp_path / f"out.{rank}").read_text())
        assert found["resumed"] == found["whole"]
        assert found["resumed_digest"] == found["whole_digest"]


def test_layers_that_stages_cannot_share_are_refused(run_ranks, qwen3_path, tmp_path):
    """Three layers on two stages."""
    with pytest.raises(AssertionError, match=r"pipeline is 2; it must divide the model's 3 layers"):
        run_ranks("resume", 2, qwen3_path, "pipeline", tmp_path / "c", tmp_path / "out.json")
