"""Runs of several turns: delays, kills and processes are not to be seen."""

import json
import os
import sys
from contextlib import closing

import pytest
import torch
from run_children import open_run, roll_out, update

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.recipes.grpo import GrpoRecipe
from samebit.recipes.run.rollouts import list_rollouts, load_rollout

TWO_TURNS = "rollout.generate=run_children:two_turns"


def words(*others):
    return [TWO_TURNS, "logger.save_rollouts=true", "trainer.num_steps=3", *others]


@pytest.fixture(scope="module")
def turned(make_runs, tmp_path_factory):
    """One run in turns, uninterrupted."""
    runs = make_runs(tmp_path_factory.mktemp("turned"))
    runs.result = runs.train("whole", *words())
    return runs


def test_sampled_tokens_of_all_turns_are_the_trainers(turned):
    summary, rows, _ = turned.result
    files = list_rollouts(turned.folder / "whole")
    samples = [sample for file in files.values() for sample in load_rollout(file)]
    assert len(samples) == 36
    masks = {tuple(sample.loss_mask.tolist()) for sample in samples}
    assert {mask.count(False) for mask in masks} == {1}
    assert summary["logprob_mismatches"] == 0
    compared = sum(int(sample.loss_mask.sum()) for sample in samples)
    assert summary["logprob_tokens_compared"] == compared > 100
    assert all(row["rollout/turns_mean"] == 2.0 for row in rows[1:])
    assert all(row["train/grad_norm"] > 0.01 for row in rows[1:])
    assert rows[1]["rollout/response_len_mean"] * 12 == sum(
        int(sample.loss_mask.sum()) for sample in samples[:12]
    )


@pytest.mark.parametrize(
    "sampling", [[], ["rollout.top_p=0.8", "rollout.logprobs=truncated"]], ids=["full", "truncated"]
)
def test_ratios_clips_and_masks_of_two_optimizer_steps(runs, sampling):
    """Of samples with text that was not drawn: in the first step every ratio is exactly 1, and
    nothing is clipped, truncated or left out; in the second hardly one is, and there is each."""
    bounds = ["algorithm.tis_clip=1.01", "algorithm.off_policy_mask_threshold=1e-6"]
    bounds += ["algorithm.clip_ratio_low=0.001", "algorithm.clip_ratio_high=0.001"]
    bounds += ["trainer.batch_size=6", *sampling]
    run, ratios = runs.resolve("ratios", TWO_TURNS, *bounds), {}
    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        loss = recipe.algorithm.loss

        def watched(inputs):
            ratios.setdefault(recipe.trainer.step, []).append(inputs.log_ratio.detach().exp())
            return loss(inputs)

        recipe.algorithm.loss = watched
        rollout = roll_out(recipe, 0)
        first, second = update(recipe, rollout)
    found = [torch.cat(ratios[step]) for step in (0, 1)]
    assert sum(map(len, found)) == sum(sum(c.loss_mask) for g in rollout.completions for c in g)
    assert found[0].eq(1).all()
    assert found[1].ne(1).float().mean() > 0.9
    assert first.metrics["train/ratio"] == 1.0
    for name in ("clip", "tis", "off_policy_mask"):
        shares = [step.metrics[f"train/{name}_fraction"] for step in (first, second)]
        assert shares[0] == 0.0 < shares[1]


@pytest.mark.parametrize("placement", ["placement=process", "engine.max_num_seqs=2"])
def test_delays_and_places_are_not_to_be_seen(runs, turned, placement):
    found = runs.train("later", *words("rollout.generate_args={seed: 7}", placement))
    assert found == turned.result


def killed(runs, kill_when, numbers):
    """A run that is killed at these samples of a function, each in the process before, and ends."""
    control = runs.folder / "generate"
    given = words(f"rollout.generate_args.control={control}", "rollout.generate_args.seed=3")
    given += ["resume=true", "trainer.checkpoint_every=1", "trainer.background_checkpoints=false"]
    arguments = runs.arguments("killed", *given)
    for number in numbers:
        marker = control.with_suffix(".held")
        marker.unlink(missing_ok=True)
        control.write_text(f"hold {number}")
        kill_when(marker.exists, ["grpo", *arguments])
    control.unlink()
    assert main(["grpo", *arguments]) == 0
    summary = json.loads((runs.folder / "killed" / "summary.json").read_text())
    return summary, runs.rows("killed")


def test_killed_between_turns_and_resumed(runs, turned, kill_when):
    """In the first step, and in a later one after a checkpoint."""
    assert killed(runs, kill_when, (9, 35)) == turned.result[:2]


@pytest.mark.long
def test_killed_at_ten_instants_and_resumed(runs, turned, kill_when):
    """In the evaluation before the first step, in each step, and as each has just been saved."""
    numbers = (1, 4, 5, 11, 17, 2, 13, 6, 12, 3)
    assert killed(runs, kill_when, numbers) == turned.result[:2]


@pytest.mark.long
@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_several_processes_draw_the_same(runs, turned, layout, monkeypatch):
    """Each copy its share; with tensor parallel ranks the first leads."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    assert main(["grpo", *runs.arguments("many", *words(f"trainer.parallel.{layout}=2"))]) == 0
    first = [list_rollouts(f)[1] for f in (runs.folder / "many", turned.folder / "whole")]
    many, whole = (load_rollout(file) for file in first)
    if layout == "data":
        assert [s.token_ids.tolist() for s in many] == [s.token_ids.tolist() for s in whole]
        assert [s.logprobs.tolist() for s in many] == [s.logprobs.tolist() for s in whole]
    assert all(row["train/logprob_mismatches"] == 0 for row in runs.rows("many")[1:])


# -- configuration ---------------------------------------------------------------------------------

WRONG = {
    "rollout.generate=two_turns": "rollout.generate is 'two_turns'; it must be module:function",
    "rollout.generate=nowhere:f": "rollout.generate is 'nowhere:f', which cannot be imported",
    "rollout.generate=json:dumps": "rollout.generate is 'json:dumps', a function; it must be an",
    f"{TWO_TURNS}; rollout.generate_args={{sed: 1}}": "rollout.generate_args is {'sed': 1}, but",
    f"{TWO_TURNS}; rollout.generate_timeout_s=0": "rollout.generate_timeout_s is 0.0; it must be",
    "rollout.generate_args={seed: 1}": "rollout.generate_args is {'seed': 1}; it must be {}",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_cannot_be_used_is_refused_in_a_dry_run(runs, capsys, given):
    arguments = runs.arguments("wrong", *given.split("; "), "dry_run=true")
    assert main(["grpo", *arguments]) in (1, 2)
    assert WRONG[given] in capsys.readouterr().err


def test_steps_leave_room_for_turns(runs):
    with pytest.raises(ConfigError, match="trainer.num_steps is 16777216; it must be below 2.24"):
        resolve("grpo", runs.arguments("long", TWO_TURNS, "trainer.num_steps=16777216"))
