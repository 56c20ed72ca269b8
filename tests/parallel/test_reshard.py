"""A checkpoint goes on under another layout: the same state to the bit, then the same steps."""

import json

import pytest
import torch

from samebit.recipes.models.tiny_model import make_random_model
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.trainer.megatron.resharding import WholeState
from samebit.weight_sync.mapping import hf_shapes

LAYOUTS = (("alone", 1), ("tensor+optimizer", 4), ("optimizer", 2), ("pipeline", 2))
FIELDS = ("params", "reference", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tied embeddings, of which the last stage of a pipeline holds a copy."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    make_random_model(folder, "qwen3", seed=3, tied=True, num_layers=2, std=0.05)
    return folder


def whole_state(model, root):
    """Every tensor of a checkpoint by field and Hugging Face name, and its step."""
    saved = WholeState(model, latest_checkpoint(root).load_all())
    names = hf_shapes(model.param_specs())
    tensors = {(field, name): saved.read(field, name) for field in FIELDS for name in names}
    return tensors, saved.first["step"]


def test_a_checkpoint_goes_from_layout_to_layout(run_ranks, folder, tmp_path):
    """Weights, reference and both moments keep every bit from one process to two of any kind and
    back; the step after is the same up to the order of its sums."""
    model = load_model_config(folder)
    results, before = [], tmp_path / "nothing"
    for i, (mode, size) in enumerate((*LAYOUTS, LAYOUTS[0])):
        after = tmp_path / f"{i}_{mode}"
        run_ranks("reshard", size, folder, mode, before, after, tmp_path / f"{i}.json")
        ranks = [json.loads((tmp_path / f"{i}.{rank}").read_text()) for rank in range(size)]
        assert all(rank == ranks[0] for rank in ranks)
        results.append((ranks[0], *whole_state(model, after)))
        before = after
    first, tensors, step = results[0]
    assert step == 2
    assert any(tensors["exp_avg", name].any() for _, name in tensors)
    for found, other, other_step in results[1:]:
        assert (found["digest"], other_step) == (first["digest"], step)
        assert other.keys() == tensors.keys()
        assert all(torch.equal(other[key], tensors[key]) for key in tensors)
        for name in ("loss", "grad_norm", "learning_rate"):
            assert found["next"][name] == pytest.approx(first["next"][name], rel=1e-6)
    assert results[-1][0] == first


def test_what_is_not_the_models_is_refused(run_ranks, folder, qwen3_path, tmp_path):
    """Parameters of another model, and a checkpoint that lacks a part of a moment."""
    run_ranks("reshard", 1, folder, "alone", tmp_path / "none", tmp_path / "a", tmp_path / "a.json")
    states = list(latest_checkpoint(tmp_path / "a").load_all())
    message = r"another model's parameters: decoder\.layers\.2.* is None there, \(48,\) here"
    with pytest.raises(ValueError, match=message):
        WholeState(load_model_config(qwen3_path), states)
    name = "decoder.final_layernorm.weight"
    states[0]["optimizer"][name]["exp_avg"] = states[0]["optimizer"][name]["exp_avg"][:40]
    saved = WholeState(load_model_config(folder), states)
    with pytest.raises(ValueError, match=f"holds 40 numbers of exp_avg of {name}, which has 48"):
        saved.read("exp_avg", "model.norm.weight")
