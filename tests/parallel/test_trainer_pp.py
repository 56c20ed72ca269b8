"""Pipeline parallel training: the rollout's bits, one process's gradients, resumed exactly."""

import json

import pytest

from samebit.recipes.tiny_model import write_config, write_weights
from samebit.rollout.engine import Engine
from samebit.trainer.config import ParallelConfig

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "head_dim": 16,
    "vocab_size": 331,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request, tmp_path_factory):
    """Two layers a stage. Llama's tied embedding is on both stages."""
    folder = tmp_path_factory.mktemp("models") / request.param
    tied = request.param == "llama"
    write_config(folder, request.param, **SHAPE, tie_word_embeddings=tied)
    write_weights(folder, seed=5, std=0.1)
    return folder


def test_two_stages_train_one_model(run_ranks, folder, gradients, tmp_path):
    """No log-prob differs from the single-process rollout's before or after training, every
    gradient and the norm are those of the whole model, and both stages know the same digest."""
    file, norm = gradients
    run_ranks("trainer", 2, folder, "pipeline", file, tmp_path / "out.json")
    first, second = (json.loads((tmp_path / f"out.{r}").read_text()) for r in range(2))
    assert first["compared"] > 300
    for found in (first, second):
        assert (found["unequal"], found["unequal_after"]) == (0, 0)
        assert max(found["errors"].values()) < 1e-5, found["errors"]
        assert found["norms"][0] == pytest.approx(norm, rel=1e-6)
    assert first["errors"].keys() != second["errors"].keys()
    assert first["norms"] == second["norms"]
    assert first["trained"] == second["trained"]
    alone = Engine(folder, device="cpu").weight_version.digest
    assert {*first["digests"], *second["digests"]} == {alone}
    assert first["trained"] != alone


def test_two_stages_resume_to_the_same_bytes(run_ranks, folder, tmp_path):
    """Each stage's state in a file of its own."""
    run_ranks("resume", 2, folder, "pipeline", tmp_path / "checkpoints", tmp_path / "out.json")
    for rank in range(2):
        found = json.loads((tmp_path / f"out.{rank}").read_text())
        assert found["resumed"] == found["whole"]
        assert found["resumed_digest"] == found["whole_digest"]


def test_layers_that_stages_cannot_share_are_refused(run_ranks, qwen3_path, tmp_path):
    """Three layers on two stages."""
    with pytest.raises(AssertionError, match=r"pipeline is 2; it must divide the model's 3 layers"):
        run_ranks("resume", 2, qwen3_path, "pipeline", tmp_path / "c", tmp_path / "out.json")
    for other in ({"context": 2}, {"sequence": True, "tensor": 2}):
        with pytest.raises(ValueError, match="they are not combined yet"):
            ParallelConfig(pipeline=2, **other)
