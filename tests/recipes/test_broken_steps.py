"""Steps that go wrong: a broken promise is seen, and half a step is neither served nor saved."""

import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from helpers import file_size_limit, outcomes
from run_children import open_run, roll_out, update

from samebit.recipes.grpo import GrpoRecipe, LogprobMismatchError
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.recorder import Progress, recording
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams
from samebit.trainer.checkpoint import list_checkpoints
from samebit.weight_sync.types import WeightSyncError

PARAMS = SamplingParams(max_new_tokens=8)


def next_float(value):
    """The next fp32 number towards zero."""
    return torch.nextafter(torch.tensor(value), torch.tensor(0.0)).item()


@pytest.fixture
def make_recipe(runs):
    """make_recipe(overrides): what a run holds, before its first step."""

    def make(*overrides):
        run = runs.resolve("broken", *overrides)
        return closing(GrpoRecipe(run, open_run(run)))

    return make


def test_a_log_prob_of_another_bit_ends_the_run(runs, monkeypatch):
    """One bit of one token of step 2: step, sample and token are told; nothing is logged or
    saved."""
    generate, calls, told = Engine.generate, [], []
    short = ["trainer.num_steps=3", "trainer.checkpoint_every=1"]

    def nudged(*args, **kwargs):
        groups = generate(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:  # the evaluation, step 1, step 2
            c = groups[2][3]
            groups[2][3] = replace(c, logprobs=(*c.logprobs[:-1], next_float(c.logprobs[-1])))
            place = len(args[1][2]) + len(c.token_ids) - 1
            told.append((c.sample_id, place, next_float(c.logprobs[-1]), c.logprobs[-1]))
        return groups

    monkeypatch.setattr(Engine, "generate", nudged)
    message = r"step 2: 1 of \d\d log-probs differ .*at most by \d.*checkpoint is unharmed"
    with pytest.raises(LogprobMismatchError, match=message) as caught:
        runs.train("broken", *short)
    [(sample, place, drawn, trained)] = told
    where = f"sample {sample:#x}, token {place}: {drawn} drawn, {trained} trained"
    assert where in str(caught.value)
    monkeypatch.undo()
    folder = runs.folder / "broken"
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0, 1]
    assert [c.step for c in list_checkpoints(folder / "checkpoints")] == [1]
    summary, rows, _ = runs.train("broken", *short, "resume=true")
    assert [row["step"] for row in rows] == list(range(4))
    compared = sum(row["train/logprob_tokens_compared"] for row in rows[1:])
    assert (summary["logprob_tokens_compared"], summary["logprob_mismatches"]) == (compared, 0)


def test_weights_that_move_after_the_rollout_are_seen(make_recipe):
    """The trainer's are not those that drew: every log-prob is compared, most differ."""
    with make_recipe() as recipe:
        rollout = roll_out(recipe, 0)
        with torch.no_grad():
            recipe.trainer.params["decoder.final_layernorm.weight"].mul_(1.01)
        with pytest.raises(LogprobMismatchError, match="step 1: "):
            update(recipe, rollout)
        drawn = sum(len(c.token_ids) for group in rollout.completions for c in group)
        assert recipe.progress.logprob_tokens_compared == drawn
        assert drawn / 2 < recipe.progress.logprob_mismatches <= drawn


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_the_trainer_reads_at_the_rollouts_temperature(make_recipe, temperature):
    """Its log-probs are the rollout's bits at any temperature."""
    with make_recipe(f"rollout.temperature={temperature}") as recipe:
        [stats] = update(recipe, roll_out(recipe, 0))
        assert stats.logprob_mismatches == 0 < stats.logprob_tokens_compared
        assert stats.metrics["train/ratio"] == 1.0


def failing_at(number, loss):
    """A loss whose call of this number fails."""
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == number:
            raise ArithmeticError("no such loss")
        return loss(*args)

    return fail


def test_weights_of_half_a_step_are_not_served(make_recipe):
    """The second of a step's two optimizer steps fails: the first has written what is shared."""
    with make_recipe("trainer.batch_size=6", "trainer.micro_batch_tokens=1000") as recipe:
        rollout, before = roll_out(recipe, 0), recipe.trainer.digest()
        recipe.algorithm.loss = failing_at(2, recipe.algorithm.loss)
        with pytest.raises(ArithmeticError, match="no such loss"):
            update(recipe, rollout)
        assert recipe.trainer.digest() != before
        message = "update to step 2 broke off: the training step failed: no such loss"
        with pytest.raises(WeightSyncError, match=message):
            roll_out(recipe, 1)
        recipe.sync()
        assert recipe.engine.weight_version.digest == recipe.trainer.digest()
        roll_out(recipe, 2)


def test_nothing_is_served_while_the_optimizer_writes(make_recipe):
    """From the beginning of an update to its commit the engine refuses work."""
    with make_recipe() as recipe:
        found, loss = [], recipe.algorithm.loss

        def ask(*args):
            with pytest.raises(WeightSyncError, match="an update to step 1 is under way") as caught:
                recipe.engine.generate([[1]], PARAMS)
            found.append(caught)
            return loss(*args)

        recipe.algorithm.loss = ask
        update(recipe, roll_out(recipe, 0))
        assert found
        assert recipe.engine.weight_version.step == 1
        assert recipe.engine.weight_version.digest == recipe.trainer.digest()


def test_the_engine_is_what_the_configuration_says(make_recipe):
    """None of its keys can change a token, so nothing else would notice one that is not read."""
    settings = {"page_size": 16, "kv_cache_tokens": 208, "max_batch_tokens": 77}
    settings |= {"max_num_seqs": 5, "prefill_chunk": 9, "prefix_cache": False, "overlap": True}
    with make_recipe(*(f"engine.{name}={value}" for name, value in settings.items())) as recipe:
        found = vars(recipe.engine.config)
        assert {name: found[name] for name in settings} == settings
        assert (found["max_model_len"], found["cuda_graphs"]) == (8 + 6, False)


def test_a_checkpoint_that_fails_beside_the_step_is_told_too(runs, capsys):
    """Two errors: the run ends with the step's, and says that nothing of the other is saved."""
    run = runs.resolve("both")
    with open_run(run) as session:

        def fail_beside_a_checkpoint():
            with recording(session, Progress(), trained=None):
                session.save(1, {"params": {"w": torch.ones(4096)}}, {"step": 1})
                raise ArithmeticError("no such loss")

        with file_size_limit(1000), pytest.raises(ArithmeticError, match="no such loss"):
            fail_beside_a_checkpoint()
    assert list((runs.folder / "both" / "checkpoints").iterdir()) == []
    assert "rank_00000.pt: [Errno 27] File too large" in capsys.readouterr().err


def test_an_engine_with_weights_of_its_own_serves_the_old_ones(make_recipe):
    """A step that failed was never sent to it."""
    with make_recipe("placement.transport=file") as recipe:
        version, rollout = recipe.engine.weight_version, roll_out(recipe, 0)
        recipe.algorithm.loss = failing_at(1, recipe.algorithm.loss)
        with pytest.raises(ArithmeticError):
            update(recipe, rollout)
        assert recipe.engine.weight_version == version
        prompts = [[1, 2], [3]]
        old = Engine(recipe.run.model.path, device="cpu").generate(prompts, PARAMS)
        assert outcomes(recipe.engine.generate(prompts, PARAMS)) == outcomes(old)


def test_rewards_too_far_apart_change_nothing(make_recipe):
    """There are no advantages, so there is no step."""
    with make_recipe() as recipe:
        rollout, digest = roll_out(recipe, 0), recipe.trainer.digest()
        rollout.rewards[1][2] = math.inf
        with pytest.raises(ValueError, match="lie too far apart"):
            update(recipe, rollout)
        assert (recipe.trainer.step, recipe.trainer.digest()) == (0, digest)
        assert recipe.engine.weight_version.step == 0
        roll_out(recipe, 1)  # nothing was begun, so the engine serves on
