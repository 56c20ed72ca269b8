"""Qwen2 in shards: each rank adds the biases of its own heads."""

import json

import pytest
import torch
from policy_steps import assert_same_figures

from samebit.recipes.models.tiny_model import make_random_model
from samebit.rollout.engine import Engine

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of the usual initial scale, as split layers sum in another order; large biases."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "qwen2"
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 128}
    make_random_model(
        folder, "qwen2", 1, tied=True, num_layers=4, std=0.02, rope_scaling=YARN, **heads
    )
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor * (20 if name.endswith(".bias") else 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ranks_of(path, size):
    return [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(size)]


@pytest.mark.parametrize("mode", [pytest.param("sequence", marks=pytest.mark.long), "pipeline"])
def test_two_ranks_train_one_model(run_ranks, gradients, folder, mode, tmp_path):
    """No log-prob differs from the rollout's before or after training, and every gradient is that
    of one process."""
    file, norm = gradients
    run_ranks("trainer", 2, folder, mode, file, tmp_path / "out.json")
    for found in ranks_of(tmp_path / "out.json", 2):
        assert found["compared"] > 300
        assert (found["unequal"], found["unequal_after"]) == (0, 0)
        assert max(found["errors"].values()) < 1e-5, found["errors"]
        assert found["norms"][0] == pytest.approx(norm, rel=1e-6)
        assert_same_figures(found["stats"], found["stats_alone"])
        assert found["digests"][1] == Engine(folder, device="cpu").weight_version.digest


def test_any_number_of_ranks_is_one_model(run_ranks, folder, tmp_path):
    """tp_invariant: the same tokens, log-probs and scores, and the trainer's are the rollout's."""
    found = {}
    for size in (1, 2):
        run_ranks("invariant", size, folder, tmp_path / f"out{size}.json")
        ranks = ranks_of(tmp_path / f"out{size}.json", size)
        assert all(rank == ranks[0] for rank in ranks)
        assert ranks[0]["compared"] > 100
        assert ranks[0]["unequal"] == 0
        found[size] = ranks[0]
    assert found[1] == found[2]


def test_a_checkpoint_goes_on_in_another_layout(run_ranks, folder, tmp_path):
    """Weights, reference and moments of the biases too, from one process to two and back."""
    results, before = [], tmp_path / "nothing"
    for i, (mode, size) in enumerate((("alone", 1), ("tensor", 2), ("alone", 1))):
        after = tmp_path / f"{i}_{mode}"
        run_ranks("reshard", size, folder, mode, before, after, tmp_path / f"{i}.json")
        results.append(ranks_of(tmp_path / f"{i}.json", size)[0])
        before = after
    assert len({found["digest"] for found in results}) == 1
    assert results[0] == results[2]
    for name in ("loss", "grad_norm"):
        assert results[1]["next"][name] == pytest.approx(results[0]["next"][name], rel=1e-5)


def test_biases_of_the_folder_are_large(folder):
    """The tests above would pass with biases that are lost in rounding."""
    engine = Engine(folder, device="cpu")
    bias = engine.get_weights_by_name("decoder.layers.2.self_attention.linear_qkv.bias")
    assert bias.shape == ((8 + 2 * 4) * 16,)
    assert torch.isfinite(bias).all()
    assert bias.std() > 0.3
