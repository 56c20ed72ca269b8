"""GRPO runs: equal in every bit however they are placed, interrupted, killed and resumed."""

import json

import pytest
import torch
from helpers import run_logged, tree
from run_children import has_begun_to_save, has_lines, open_run

from samebit.recipes.cli.main import main
from samebit.recipes.data.rewards import RewardError
from samebit.recipes.grpo import GrpoRecipe
from samebit.recipes.run.metrics import read_rows
from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints

SUMMARY_KEYS = [
    "reward_first",
    "reward_last",
    "logprob_tokens_compared",
    "logprob_mismatches",
    "weights_digest",
]


def test_what_a_run_leaves(base):
    """The names that the README, the report and every later tool rely on."""
    summary, rows, samples = base.result
    folder = base.folder / "base"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert list(summary) == SUMMARY_KEYS
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[0].keys() == {
        "step",
        "eval/reward_mean",
        "eval/reward_std",
        "eval/response_len_mean",
        "eval/truncated_fraction",
    }
    for row in rows[1:]:
        evaluated = row["step"] in (3, 6)
        assert ("eval/reward_mean" in row) is evaluated
        assert {"rollout/reward_mean", "train/loss", "train/grad_norm", "train/ratio"} < row.keys()
        assert row["train/rollout_logprob_abs_diff_max"] == 0.0
        assert row["train/ratio"] == 1.0
        assert row["train/logprob_mismatches"] == 0
        assert row["train/learning_rate"] == 1e-2
    timed = read_rows(folder / "metrics.jsonl")[-1]
    phases = {f"perf/{x}_s" for x in ("rollout", "train", "sync", "eval")}
    assert phases | {"perf/rollout_tokens_per_s", "perf/train_tokens_per_s"} < timed.keys()
    assert summary["reward_first"] == rows[0]["eval/reward_mean"]
    assert summary["reward_last"] == rows[6]["eval/reward_mean"]
    compared = sum(row["train/logprob_tokens_compared"] for row in rows[1:])
    assert summary["logprob_tokens_compared"] == compared > 100
    assert summary["logprob_mismatches"] == 0
    seen = {kind: {s["step"] for s in samples if s["kind"] == kind} for kind in ("eval", "train")}
    assert seen == {"eval": {0, 3, 6}, "train": {3, 6}}
    assert {"prompt", "completion", "label", "reward", "finish_reason"} < samples[0].keys()
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "report.html", "checkpoints", "metrics.jsonl"} < names
    checkpoints = list_checkpoints(folder / "checkpoints")
    assert [c.step for c in checkpoints] == [4, 6]
    assert summary["weights_digest"] in (folder / "report.html").read_text()


def test_the_small_run_is_not_a_trivial_one(base):
    """If rewards or gradients were zero, every comparison below would hold for a broken run."""
    _, rows, _ = base.result
    assert all(row["train/grad_norm"] > 0.01 for row in rows[1:])
    assert all(row["rollout/reward_std"] > 0.1 for row in rows[1:])
    lengths = {row["rollout/response_len_mean"] for row in rows[1:]}
    assert len(lengths) > 3


def test_two_runs_are_the_same_run(runs, base):
    """Same configuration: same weights, same metrics, same samples."""
    assert runs.train("again") == base.result


def test_another_seed_is_another_run(runs, base):
    """The seed must reach the noise, or runs could not be repeated independently."""
    summary, rows, _ = runs.train("seed", "seed=1")
    assert summary["weights_digest"] != base.result[0]["weights_digest"]
    assert rows[1]["train/entropy"] != base.result[1][1]["train/entropy"]


@pytest.mark.parametrize(
    "placement",
    [
        ["reward.num_workers=3"],
        ["placement.transport=file"],
        ["placement=process"],
        ["placement=process", "placement.transport=file"],
        ["engine.page_size=16", "engine.kv_cache_tokens=64", "engine.max_num_seqs=3"],
        ["engine.prefix_cache=false", "engine.prefill_chunk=2", "engine.max_batch_tokens=7"],
        ["trainer.parallel.recompute=full"],
        ["trainer.parallel.offload_optimizer=true"],
        ["placement.release_memory=true"],
    ],
    ids=[
        "reward workers",
        "file",
        "gloo process",
        "file process",
        "preempting",
        "small batches",
        "recompute",
        "offload",
        "released memory",
    ],
)
def test_placement_and_scheduling_change_nothing(runs, base, placement):
    """Where the engine runs, how weights reach it and how it batches are matters of speed."""
    assert runs.train("placed", *placement) == base.result


def test_tp_invariant_is_another_profile_for_engine_and_trainer(runs, base):
    """Both sum row-parallel products in segments, wherever the engine runs."""
    invariant = ["numerics.tp_invariant=true", "algorithm=grpo_kl", "algorithm.kl_coef=0.1"]
    found = runs.train("invariant", *invariant)
    assert runs.train("placed", *invariant, "placement=process", "placement.delta=true") == found
    assert found[0]["logprob_mismatches"] == 0
    assert found[1][1]["train/kl"] == 0.0  # the reference sums in segments too
    assert found[0]["weights_digest"] != base.result[0]["weights_digest"]


@pytest.mark.parametrize("max_tokens", [14, 1000])
def test_micro_batches_do_not_change_what_is_compared(runs, base, max_tokens):
    """Packing may move a gradient's rounding, never the log-probs of the forward."""
    summary, rows, _ = runs.train("packed", f"trainer.micro_batch_tokens={max_tokens}")
    assert summary["logprob_mismatches"] == 0
    first = [key for key in rows[1] if key.startswith("rollout/")] + ["train/entropy"]
    assert [rows[1][k] for k in first[:-1]] == [base.result[1][1][k] for k in first[:-1]]
    assert rows[1]["train/entropy"] == pytest.approx(base.result[1][1]["train/entropy"], abs=1e-12)


@pytest.mark.long
def test_killed_in_rollouts_and_evaluations_and_resumed(runs, base, kill_when):
    """SIGKILL again and again, at known places, is not to be seen in the result."""
    at_once = "trainer.background_checkpoints=false"
    arguments = ["grpo", *runs.arguments("killed", "resume=true", at_once)]
    folder = runs.folder / "killed"
    places = (
        (2, 0),  # the first evaluation: nothing is written yet
        (10, 1),  # the rollout of step 1, before any checkpoint
        (30, 3),  # step 3, after the checkpoint of step 2
        (15, 3),  # resumed at step 2: the evaluation after step 3, not logged yet
        (45, 6),  # resumed at step 2: step 6, after the checkpoint of step 4
        (27, 6),  # resumed at step 4: the last evaluation
    )
    for number, lines in places:
        kill_when(runs.held(number), arguments)
        assert len(read_rows(folder / "metrics.jsonl")) == lines
    runs.control.unlink()
    assert not (folder / "summary.json").exists()
    assert runs.train("killed", "resume=true") == base.result
    assert json.loads((folder / "summary.json").read_text()) == base.result[0]


@pytest.mark.long
def test_killed_while_files_are_written_and_resumed(runs, base, kill_when):
    """SIGKILL as soon as a metrics line or a checkpoint begins to appear."""
    folder = runs.folder / "killed"
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"

    moments = [
        folder.exists,
        has_lines(metrics, 1),
        has_begun_to_save(checkpoints, 2),
        has_lines(metrics, 4),
        has_begun_to_save(checkpoints, 4),
        has_lines(metrics, 6),
        has_begun_to_save(checkpoints, 6),
        (folder / "summary.json").exists,
    ]
    for moment in moments:
        kill_when(moment, ["grpo", *runs.arguments("killed", "resume=true")])
        newest = latest_checkpoint(checkpoints)
        assert newest is None or newest.load()["step"] == newest.step
    assert runs.train("killed", "resume=true") == base.result
    assert [c.step for c in list_checkpoints(checkpoints)] == [4, 6]


def test_resume_under_other_speed_settings(runs, base, kill_when):
    """Engine settings, interval and number of checkpoints may change between kill and resume."""
    kill_when(runs.held(30), ["grpo", *runs.arguments("moved")])
    runs.control.unlink()
    other = ["placement.transport=file", "engine.page_size=16", "trainer.checkpoint_every=3"]
    other += ["trainer.parallel.offload_optimizer=true", "trainer.parallel.recompute=full"]
    assert runs.train("moved", "resume=true", *other) == base.result


def test_resume_of_a_finished_run_changes_nothing(runs, base):
    """Giving the same command once more must be harmless."""
    runs.train("done")
    before = tree(runs.folder / "done" / "checkpoints")
    assert runs.train("done", "resume=true") == base.result
    assert tree(runs.folder / "done" / "checkpoints") == before


def test_resume_without_a_run_starts_one(runs, base):
    """A job that always says resume=true must be able to begin."""
    assert runs.train("new", "resume=true") == base.result


def test_a_run_can_be_made_longer(runs, base):
    """At a constant rate, three steps and three more are six."""
    runs.train("long", "trainer.num_steps=3")
    assert runs.train("long", "resume=true") == base.result


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "trainer.optimizer.lr=2e-2",
        "rollout.temperature=0.9",
        "algorithm.clip_ratio_high=0.3",
        "data.size=51",
        "trainer.optimizer.lr_schedule=linear",
        "reward.name=run_children:fussy",
    ],
)
def test_resume_under_another_configuration_is_refused(base, change):
    """A run that is half one thing and half another is no run at all."""
    before = tree(base.folder / "base")
    with pytest.raises(CheckpointError, match="step_00000006 was written under another config"):
        open_run(base.resolve("base", "resume=true", change))
    assert tree(base.folder / "base") == before


def test_an_existing_run_is_not_lost(base):
    """Forgetting resume=true must cost nothing."""
    before = tree(base.folder / "base")
    with pytest.raises(FileExistsError, match="base.*resume=true.*overwrite=true"):
        open_run(base.resolve("base"))
    assert tree(base.folder / "base") == before


def test_a_folder_of_other_things_is_not_lost(runs):
    """run_name may name any folder; what no run made must not be removed."""
    folder = runs.folder / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("ten years of work")
    with pytest.raises(FileExistsError, match="thesis.*overwrite=true"):
        open_run(runs.resolve("thesis"))
    with pytest.raises(FileExistsError, match="no run made it, so overwrite=true removes"):
        open_run(runs.resolve("thesis", "overwrite=true"))
    assert (folder / "chapter1.tex").read_text() == "ten years of work"


def test_an_empty_folder_is_fine(runs):
    """A launcher may have made it."""
    (runs.folder / "empty").mkdir()
    open_run(runs.resolve("empty"))


def test_overwrite_starts_anew(runs, base):
    """Nothing of the earlier run may survive in the new one."""
    runs.train("over", "seed=1", "trainer.num_steps=2")
    assert runs.train("over", "overwrite=true") == base.result


def test_a_reward_that_raises_costs_nothing(runs, base):
    """The error names reward and problem; the last checkpoint loads and the run goes on from it."""
    runs.control.write_text("fail 33")  # in the rollout of step 3
    message = r"run_children:score_digits' on problem \d+, completion .* raised KeyError: 'no such"
    with pytest.raises(RewardError, match=message):
        runs.train("reward")
    checkpoint = latest_checkpoint(runs.folder / "reward" / "checkpoints")
    assert checkpoint.load()["step"] == checkpoint.step == 2
    runs.control.unlink()
    assert runs.train("reward", "resume=true") == base.result


def test_a_sample_id_is_never_used_twice(runs):
    """Rolling out a step again in the same run would draw the same noise again."""
    run = runs.resolve("ids")
    recipe = GrpoRecipe(run, open_run(run))
    source = recipe.rollout_source
    groups = [*source.draw(source.training_prompts(0)).completions]
    groups += source.draw(source.held_out_prompts(0)).completions
    ids = [c.sample_id for group in groups for c in group]
    assert len(set(ids)) == len(ids) == 12 + 4
    with pytest.raises(ValueError, match="sample ids of step 0 .* were used in this run"):
        source.training_prompts(0)
    with pytest.raises(ValueError, match="sample ids of step 0 .* were used in this run"):
        source.held_out_prompts(0)
    recipe.close()


def test_two_optimizer_steps_a_rollout(runs, kill_when):
    """Off-policy steps: the first is compared, the second has a ratio that moves; it resumes."""
    split = ["trainer.batch_size=6"]
    summary, rows, samples = runs.train("split", *split)
    assert summary["logprob_mismatches"] == 0
    # The mean over the two steps: the first is exactly 1, the second is not.
    assert all(row["train/ratio"] != 1.0 for row in rows[1:])
    assert all(row["train/rollout_logprob_abs_diff_max"] == 0.0 for row in rows[1:])
    half = summary["logprob_tokens_compared"]
    whole = sum(row["rollout/response_len_mean"] * 12 for row in rows[1:])
    assert 0.3 * whole < half < 0.7 * whole
    checkpoint = latest_checkpoint(runs.folder / "split" / "checkpoints")
    assert checkpoint.step == 6
    assert checkpoint.load()["step"] == 12
    kill_when(runs.held(30), ["grpo", *runs.arguments("killed", *split)])
    runs.control.unlink()
    assert runs.train("killed", "resume=true", *split) == (summary, rows, samples)


def test_with_a_reference_model(runs, base, kill_when):
    """The KL penalty starts at exactly 0, changes the run, and its reference is part of resume."""
    penalty = ["algorithm=grpo_kl", "algorithm.kl_coef=0.5"]
    summary, rows, samples = runs.train("kl", *penalty)
    assert rows[1]["train/kl"] == 0.0
    assert all(row["train/kl"] > 0 for row in rows[2:])
    assert summary["weights_digest"] != base.result[0]["weights_digest"]
    kill_when(runs.held(30), ["grpo", *runs.arguments("killed", *penalty)])
    runs.control.unlink()
    assert runs.train("killed", "resume=true", *penalty) == (summary, rows, samples)


def test_the_exported_weights_are_those_of_the_digest(base):
    """summary.json names the weights of the last checkpoint."""
    from samebit.rollout.models.registry import load_model_config
    from samebit.weight_sync.digest import weights_digest

    state = latest_checkpoint(base.folder / "base" / "checkpoints").load()
    specs = load_model_config(base.model).param_specs()
    assert weights_digest(specs, state["params"]) == base.result[0]["weights_digest"]
    assert all(bool(torch.isfinite(p).all()) for p in state["params"].values())


BAD_INPUT = {
    "no model folder": (["model.path=/no/such/model"], "/no/such/model does not exist"),
    "no data file": (
        ["data=file", "data.path=/no/such/file.jsonl"],
        "/no/such/file.jsonl does not exist",
    ),
    "data path unset": (["data=file"], "data.path is unset"),
    "unknown reward": (["reward.name=exact_macth"], "reward.name is 'exact_macth'; give one of"),
    "reward not importable": (["reward.name=run_children:nothing"], "cannot be imported"),
    "unknown task": (["data.task=reverse"], "data.task is 'reverse'; give one of"),
    "no held-out problems": (["data.eval_size=0"], "data.eval_size"),
    "prompts too long": (["rollout.max_prompt_len=2"], "its prompt has 3 tokens"),
    "longer than the model": (
        ["rollout.max_new_tokens=100", "trainer.micro_batch_tokens=200"],
        "64",
    ),
    "too little cache": (["engine.kv_cache_tokens=4"], "kv_cache_tokens is 4"),
    "bad top_p": (["rollout.top_p=0"], "top_p is 0"),
    "too many samples": (
        ["rollout.samples_per_prompt=5000"],
        "samples per prompt = 5000 exceed the 4096",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(runs, capsys, case):
    """Each mistake of a user has one line that says what is wrong, and no traceback."""
    overrides, message = BAD_INPUT[case]
    arguments = runs.arguments("bad")
    if "data=file" in overrides:
        arguments = [a for a in arguments if not a.startswith("data.")]
    code = main(["grpo", *arguments, *overrides])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("samebit ")]
    assert code in (1, 2)
    assert len(error) == 1
    assert message in error[0]


def test_weights_that_are_not_finite_are_not_trained_on(runs, capsys, tmp_path):
    """Found when loaded, with the tensor's name."""
    import shutil

    from helpers import edit_tensors

    folder = shutil.copytree(runs.model, tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert main(["grpo", *runs.arguments("nan"), f"model.path={folder}"]) == 1
    assert "NaN or Inf in: decoder.final_layernorm.weight" in capsys.readouterr().err


def test_weights_that_explode_stop_the_run(runs, capsys):
    """An absurd learning rate ends in a clear error, not in a run of NaN."""
    code = main(["grpo", *runs.arguments("explode"), "trainer.optimizer.lr=1e30"])
    assert code == 1
    assert "NaN or Inf" in capsys.readouterr().err


def test_cuda_without_a_gpu_is_a_clear_error(runs, forkserver, tmp_path):
    """device=cuda must not fall back to the CPU in silence."""
    log, words = tmp_path / "log", runs.arguments("cuda", "device=cuda")
    program = (log, "run_children", "run_cli_without_gpus", "grpo", *words)
    process = forkserver.Process(target=run_logged, args=program)
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert "torch finds no CUDA device; use device=cpu" in log.read_text()
    assert not (runs.folder / "cuda").exists()
