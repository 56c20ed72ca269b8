"""rollout.logprobs=truncated in a run: on-policy to the bit, and the sets of later steps kept."""

from contextlib import closing

import pytest
import torch
from run_children import open_run, roll_out, update

from samebit.kernels.truncation import KeptSets, Thresholds
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.dry_run import describe_grpo
from samebit.recipes.cli.main import main
from samebit.recipes.grpo import GrpoRecipe

WORDS = ["rollout.top_p=0.7", "rollout.top_k=9", "rollout.min_p=0.02", "rollout.temperature=0.7"]
TRUNCATED = [*WORDS, "rollout.logprobs=truncated"]


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_first_of_two_steps_is_on_policy(runs, kl_coef):
    """Its log-probs are the rollout's bits, so is the reference's KL; the second step's ratios have
    moved, and stay finite: what could be drawn is what it was."""
    seen = []
    words = [*TRUNCATED, "trainer.batch_size=6", f"algorithm.kl_coef={kl_coef}"]
    with closing(GrpoRecipe(run := runs.resolve("own", *words), open_run(run))) as recipe:
        own = recipe.algorithm.loss
        recipe.algorithm.loss = lambda inputs: seen.append(inputs) or own(inputs)
        rollout = roll_out(recipe, 0)
        stats = update(recipe, rollout)
    assert [s.logprob_mismatches for s in stats[:1]] == [0]
    assert stats[0].logprob_tokens_compared > 12
    assert stats[0].metrics["train/ratio"] == 1.0
    assert stats[1].metrics["train/ratio"] != 1.0
    at = [i for i, inputs in enumerate(seen) if inputs.batch.index == 0]
    parts = seen[: at[1]], seen[at[1] :]
    of_first = KeptSets if kl_coef else Thresholds
    assert {type(x.batch.kept) for x in parts[0]} == {of_first}
    assert {type(x.batch.kept) for x in parts[1]} == {KeptSets}
    for inputs in parts[0]:
        assert inputs.log_ratio.detach().eq(0).all()
        if kl_coef:
            assert torch.equal(inputs.logprobs.detach(), inputs.ref_logprobs)
    assert all(x.logprobs.isfinite().all() for x in parts[1])
    sizes = torch.cat([x.batch.kept.counts for x in parts[1]])
    assert sizes.min() < 9
    assert sizes.max() <= 9


def test_the_reference_of_rewards_is_truncated_too(runs):
    """To the bit, so that the KL of the first step is exactly 0; and no longer on the second."""
    words = [*TRUNCATED, "algorithm=rloo", "algorithm.kl_coef=0.1", "trainer.batch_size=6"]
    with closing(GrpoRecipe(run := runs.resolve("kl", *words), open_run(run))) as recipe:
        found = []
        for step in range(2):
            assert update(recipe, roll_out(recipe, step))[0].logprob_mismatches == 0
            found.append(recipe.reference_metrics["rollout/kl"])
    assert found[0] == 0.0
    assert found[1] not in (0.0, float("inf"), -float("inf"))


@pytest.mark.parametrize("words", [WORDS, TRUNCATED])
def test_evaluations_are_of_the_policy_that_is_trained(runs, words):
    """Within the limits if log-probs are truncated; else of the full softmax."""
    with closing(GrpoRecipe(run := runs.resolve("own", *words), open_run(run))) as recipe:
        drawn = recipe.rollout_source.training_prompts(0).params
        held_out = recipe.rollout_source.held_out_prompts(0).params
    limits = (0.7, 9, 0.02)
    assert (drawn.top_p, drawn.top_k, drawn.min_p) == limits
    assert drawn.truncated_logprobs is (words is TRUNCATED)
    found = held_out.top_p, held_out.top_k, held_out.min_p
    assert found == (limits if words is TRUNCATED else (1.0, 0, 0.0))


def test_a_dry_run_says_what_log_probs_are_of(demo_model, tmp_path):
    words = [f"model.path={demo_model}", f"output_dir={tmp_path}", "device=cpu"]
    words += ["data=reverse_digits", "rollout.max_prompt_len=40"]
    words += ["rollout.max_new_tokens=24"]

    def said(*more):
        return describe_grpo(resolve("grpo", [*words, *more]))["logprobs"]

    assert said() == "of the full softmax, which draws"
    assert "gradients are biased; rollout.logprobs=truncated" in said(*WORDS)
    assert said(*TRUNCATED) == "of what may be drawn: top_p, top_k, min_p"
    assert "one more forward pass" in said(*TRUNCATED, "trainer.batch_size=8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.logprobs=kept"], "rollout.logprobs is 'kept'; it must be one of ('full', 'tr"),
        (["rollout.logprobs=truncated"], "rollout.logprobs is 'truncated'; it must be full where"),
    ],
)
def test_what_would_mean_nothing_is_refused(words, message, capsys):
    assert main(["grpo", "model.path=m", *words, "dry_run=true"]) == 2
    assert message in capsys.readouterr().err
