"""numerics.attention: one kind for engine and trainer, named in checkpoints and reports."""

import json
from contextlib import closing

import pytest
from plain_attention import PlainAttention
from run_children import open_run, roll_out, update

from samebit.kernels.attention import CanonicalAttention
from samebit.recipes.cli.main import main
from samebit.recipes.grpo import GrpoRecipe
from samebit.recipes.run.binding import bound_keys
from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint

PLAIN = "numerics.attention=plain_attention:PlainAttention"
KL = ["algorithm=grpo_kl", "algorithm.kl_coef=0.1"]


def kinds_of(recipe):
    """Of engine, trainer, its layers, and the reference's."""
    chunks = [*recipe.trainer._chunks, *recipe.trainer._reference_model()._chunks]
    found = {type(chunk.config.attention) for chunk in chunks}
    layers = recipe.trainer._chunks[0].module.decoder.layers
    found |= {type(layer.self_attention.core_attention.attention) for layer in layers}
    return found | {type(x.attention) for x in (recipe.engine, recipe.trainer)}


@pytest.mark.parametrize(
    ("word", "kind"),
    [(PLAIN, PlainAttention), ("numerics.attention=canonical", CanonicalAttention)],
)
def test_engine_and_trainer_have_the_runs_kind(runs, word, kind):
    run = runs.resolve("run", word, *KL)
    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        assert kinds_of(recipe) == {kind}
        assert recipe.engine.profile.attention == kind.name


def test_a_kind_without_the_promise_is_compared_and_goes_on(runs):
    """What differs is counted and logged; it breaks no promise."""
    run = runs.resolve("run", PLAIN)
    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        rollout = roll_out(recipe, 0)
        [stats] = update(recipe, rollout)
        drawn = sum(len(c.token_ids) for group in rollout.completions for c in group)
        assert recipe.progress.logprob_tokens_compared == drawn
        assert recipe.progress.logprob_mismatches == stats.logprob_mismatches > 0
        assert stats.logprob_abs_diff_max < 1e-4


def test_a_checkpoint_is_bound_to_the_kind_by_its_profile(runs):
    """Under either it is refused by the other; the key itself is not bound a second time."""
    short = ["trainer.num_steps=2"]
    runs.train("run", PLAIN, *short)
    checkpoint = latest_checkpoint(runs.folder / "run" / "checkpoints")
    assert checkpoint.manifest["numerics"]["attention"] == PlainAttention.name
    message = "another numerics profile.*: kv_tile None -> 64, attention plain 1.0 -> canonical$"
    with pytest.raises(CheckpointError, match=message):
        open_run(runs.resolve("run", "resume=true", *short))
    keys = bound_keys(runs.resolve("run", PLAIN))
    assert {key for key in keys if key.startswith("numerics.")} == {
        "numerics.tp_invariant",
        "numerics.grad_segments",
    }


def test_verify_measures_the_kind(tmp_path, capsys):
    """The trainer's log-probs are not the rollout's, and the report says of which kind."""
    where = [f"output_dir={tmp_path}", "run_name=out", "device=cpu"]
    assert main(["verify", *where, PLAIN, "properties=[trainer]"]) == 1
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert report["numerics"]["attention"] == PlainAttention.name
    assert 0 < report["mismatches"] <= report["comparisons"]
    assert "mismatches" in capsys.readouterr().err
