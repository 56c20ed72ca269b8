"""At learning rate 0 nothing may move: neither digest nor log-probs, over many syncs."""

import pytest
from run_children import open_run, roll_out, update

from samebit.recipes.grpo import GrpoRecipe

TOKENS = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8, 9, 7]]


@pytest.mark.parametrize(
    "placement",
    [[], ["placement=process"]],
    ids=["alias", "gloo process"],
)
def test_learning_rate_0_changes_nothing(runs, placement):
    """Gradients and moments are computed all the same; the step and its sync must be exact."""
    run = runs.resolve("still", "trainer.optimizer.lr=0", "trainer.num_steps=20", *placement)
    recipe = GrpoRecipe(run, open_run(run))
    digest, logprobs = recipe.trainer.digest(), recipe.engine.score(TOKENS)
    for step in range(20):
        [stats] = update(recipe, roll_out(recipe, step))
        assert stats.grad_norm > 0.01
        assert stats.logprob_mismatches == 0
        version = recipe.engine.weight_version
        assert (version.step, version.digest) == (step + 1, digest)
        assert recipe.engine.score(TOKENS) == logprobs
    recipe.close()
