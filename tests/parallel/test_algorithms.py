"""Losses that see whole samples: two ranks find what one process finds."""

import json
import math

import pytest
import torch
from losses import policy_gradients
from policy_steps import gradient_samples
from rank_losses import made_up, near

from samebit.trainer.algorithms.registry import ALGORITHMS
from samebit.trainer.context import in_rows, sample_sums
from samebit.trainer.packing import pack_samples


def test_sums_of_samples_are_over_the_shares_of_all_ranks(run_ranks, tmp_path):
    """To the bit on two ranks and on three, some of which have no row of a short sample; and the
    gradient is that of one process."""
    [batch] = pack_samples(made_up(gradient_samples()), 1000)
    values = batch.rollout_logprobs.clone().requires_grad_()
    sums = sample_sums(values, batch)
    (in_rows(sums.sin(), batch) * batch.advantages).sum().backward()
    for size in (2, 3):
        run_ranks("rank_losses.sums", size, tmp_path / "out.pt")
        found = [torch.load(tmp_path / f"out.{rank}") for rank in range(size)]
        rows = torch.cat([each["rows"] for each in found])
        assert rows.sort().values.tolist() == list(range(len(batch.rows)))
        for rank in found:
            assert torch.equal(rank["sums"], sums.detach())
            torch.testing.assert_close(rank["grad"], values.grad[rank["rows"]])


def test_policy_gradients_are_the_same_on_context_ranks(run_ranks, tmp_path):
    """Each algorithm's losses and figures have the same bits, those of whole samples too; so have
    the gradients, but for GSPO's, which are sums over the ranks."""
    [batch] = pack_samples(made_up(gradient_samples()), 1000, "sequence")
    alone = policy_gradients(batch, near(batch))
    run_ranks("rank_losses.losses", 2, tmp_path / "out.pt")
    for rank in range(2):
        saved = torch.load(tmp_path / f"out.{rank}")
        assert saved["found"].keys() == alone.keys()
        for name, rows in saved["found"].items():
            assert rows.keys() == alone[name].keys()
            for key, values in rows.items():
                expected = alone[name][key][saved["rows"]]
                if (name, key) == ("gspo", "grad"):
                    torch.testing.assert_close(values, expected)
                else:
                    assert torch.equal(values, expected), (name, key)


@pytest.fixture(scope="module")
def alone(folder, run_together, tmp_path_factory):
    """What one process finds."""
    file = tmp_path_factory.mktemp("alone") / "step.pt"
    run_together("rank_losses.step", [(0, 1, None, folder, "alone", file, None)])
    return file


@pytest.mark.parametrize("mode", ["context", "tensor", "pipeline", "data"])
def test_two_ranks_take_the_step_of_one(run_ranks, folder, alone, mode, tmp_path):
    """Of every algorithm, from rewards to every gradient, whole samples' ratios, pairs and every
    mean too; and truncated log-probs, whose kept sets other weights know; and a critic's values,
    with the tokens split too where layers are. Split layers sum products in another order."""
    run_ranks("rank_losses.step", 2, folder, mode, alone, tmp_path / "out.json")
    expected, bound = torch.load(alone), 1e-5 if mode == "tensor" else 1e-6
    assert 0 < expected["steps"]["cispo"]["metrics"]["train/off_policy_mask_fraction"] < 1
    for rank in range(2):
        found = json.loads((tmp_path / f"out.{rank}").read_text())
        others = {"gspo_token", "distillation_top_k", "dpo", "sft"}
        assert found["errors"].keys() == ALGORITHMS.keys() | others
        for name, errors in found["errors"].items():
            own, other = found["steps"][name], expected["steps"][name]
            for key in ("loss", "grad_norm", "metrics"):
                assert own[key] == pytest.approx(other[key], rel=bound, abs=bound), (name, key)
            assert max(errors.values()) < bound, (name, errors)
        for own, other in zip(found["reference"], expected["reference"], strict=True):
            assert own == (pytest.approx(other, rel=1e-5) if mode == "tensor" else other)
        [(own_critic, _)] = expected["critic"]
        assert len(found["critic"]) == (2 if mode == "tensor" else 1)
        for critic, errors in found["critic"]:
            assert critic == pytest.approx(own_critic, rel=1e-6)
            assert max(errors.values()) < 1e-6, errors
        (rows, figures), (all_rows, all_figures) = found["truncated"], expected["truncated"]
        assert figures == pytest.approx(all_figures, rel=1e-6)
        for index, (drawn, later, reference) in rows.items():
            assert drawn == reference
            assert -math.inf in drawn
            for own, other in zip((drawn, later), all_rows[int(index)], strict=False):
                assert own == (pytest.approx(other, rel=1e-5) if mode == "tensor" else other)
