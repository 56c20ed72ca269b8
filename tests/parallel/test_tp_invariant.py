"""tp_invariant: one, two and four tensor parallel ranks give the same bits, engine and trainer."""

import json

import pytest
import torch

from samebit.kernels.contract import TP_SEGMENTS, tree_sum
from samebit.kernels.linear import linear, linear_in_segments
from samebit.kernels.profile import numerics_profile
from samebit.kernels.reduce import RankGroup
from samebit.recipes.cli.compose import resolve
from samebit.recipes.config import ConfigError
from samebit.recipes.models.tiny_model import write_config, write_weights
from samebit.rollout.engine import Engine

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Row-parallel widths of 128 and 1,024: their sums show another order."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 128, "intermediate_size": 1024, "head_dim": 16, "vocab_size": 900}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}
    write_config(folder, "qwen3", **shape, **heads, tie_word_embeddings=False)
    write_weights(folder, seed=7, std=0.1)
    return folder


def test_any_number_of_ranks_is_one_model(run_ranks, folder, tmp_path):
    """The same tokens, log-probs and scores, and the trainer's log-probs are the rollout's."""
    found = {}
    for size in (1, 2, 4):
        run_ranks("invariant", size, folder, tmp_path / f"out{size}.json")
        ranks = [json.loads((tmp_path / f"out{size}.{r}").read_text()) for r in range(size)]
        assert all(rank == ranks[0] for rank in ranks)
        assert ranks[0]["compared"] > 100
        assert ranks[0]["unequal"] == 0
        found[size] = ranks[0]
    assert found[1] == found[2] == found[4]
    assert found[1]["profile"] == numerics_profile(CPU, tp_invariant=True).digest
    assert found[1]["profile"] != numerics_profile(CPU).digest
    plain = Engine(folder, device="cpu", seed=3).score([[1, 2, 3, 4, 5, 6]])
    other = Engine(folder, device="cpu", seed=3, ranks=RankGroup(invariant=True))
    assert other.score([[1, 2, 3, 4, 5, 6]]) != plain


def test_a_critic_of_another_layout_has_the_same_values(run_ranks, folder, tmp_path):
    """To the bit, whether its layers are split or not."""
    own = [{"tensor": 1, "data": 2}, {"tensor": 1, "pipeline": 2}]
    run_ranks("rank_critic.invariant_values", 2, folder, json.dumps(own), tmp_path / "out")
    for rank in range(2):
        same, count = json.loads((tmp_path / f"out.{rank}").read_text())
        assert same == [True, True]
        assert count > 50


@pytest.mark.parametrize("width", [128, 1024])
def test_segments_are_summed_as_one_tree(width):
    """However the ranks share the segments; the tree is not the order from left to right."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(19, width, generator=generator, requires_grad=True)
    weight = torch.randn(48, width, generator=generator, requires_grad=True)
    whole = linear_in_segments(x, weight, TP_SEGMENTS)
    for size in (2, 4, 8):
        shards = zip(x.chunk(size, 1), weight.chunk(size, 1), strict=True)
        parts = [linear_in_segments(a, b, TP_SEGMENTS // size) for a, b in shards]
        assert torch.equal(tree_sum(parts), whole)
    parts = [
        linear(a, b)
        for a, b in zip(x.chunk(TP_SEGMENTS, 1), weight.chunk(TP_SEGMENTS, 1), strict=True)
    ]
    in_a_row = parts[0]
    for part in parts[1:]:
        in_a_row = in_a_row + part
    assert not torch.equal(in_a_row, whole)
    assert torch.allclose(in_a_row, whole, atol=1e-3)
    grad = torch.randn(whole.shape, generator=generator)
    plain = torch.autograd.grad(linear(x, weight), (x, weight), grad)
    for ours, theirs in zip(torch.autograd.grad(whole, (x, weight), grad), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_cut_up_is_refused(tmp_path):
    shape = {"hidden_size": 48, "intermediate_size": 100, "head_dim": 16, "vocab_size": 331}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 1}
    write_config(tmp_path, "llama", **shape, **heads, tie_word_embeddings=False)
    invariant = RankGroup(invariant=True)
    with pytest.raises(ValueError, match=r"intermediate_size is 100; .* a multiple of 8"):
        Engine(tmp_path, device="cpu", load_format="dummy", ranks=invariant)
    with pytest.raises(ValueError, match="tensor size is 3; with tp_invariant it must divide 8"):
        RankGroup(0, 3, object(), invariant=True)
    overrides = ["model.path=x", "trainer.parallel.tensor=3", "numerics.tp_invariant=true"]
    with pytest.raises(ConfigError, match=r"trainer\.parallel\.tensor is 3; it must be 1, 2, 4 or"):
        resolve("grpo", overrides)
