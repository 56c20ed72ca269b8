"""PPO runs: the critic's place in steps, checkpoints, memory and figures."""

from contextlib import closing

import pytest
import torch
from run_children import open_run, roll_out
from safetensors import safe_open

from samebit.recipes.cli.dry_run import describe_grpo
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.recipes.grpo import GrpoRecipe
from samebit.recipes.models.tiny_model import make_demo_model
from samebit.recipes.run.binding import bindings
from samebit.recipes.run.input_files import input_files
from samebit.recipes.run.training_metrics import PhaseTimer
from samebit.rollout.models.decoder import EMBEDDING, OUTPUT
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.checkpoint import latest_checkpoint

PPO = (
    "algorithm=ppo",
    "algorithm.kl_coef=0.05",
    "trainer.batch_size=6",
    "critic.warmup_steps=2",
    "critic.optimizer.lr=1e-2",
)


@pytest.fixture(scope="module")
def ppo(make_runs, tmp_path_factory):
    """One uninterrupted run of six steps, in the first two of which the policy waits."""
    runs = make_runs(tmp_path_factory.mktemp("ppo"))
    runs.result = runs.train("base", *PPO)
    return runs


def test_the_policy_waits_and_the_critic_learns(ppo):
    """While it waits nothing of it is trained or compared; then as in any run."""
    summary, rows, _ = ppo.result
    for row in rows[1:]:
        waits = row["step"] <= 2
        assert ("train/loss" in row) is not waits
        assert {
            "critic/vf_loss",
            "critic/grad_norm",
            "critic/vf_clipfrac",
            "critic/lr",
        } < row.keys()
        assert {"critic/vpred_mean", "critic/vf_explained_var"} < row.keys()
        assert row["critic/grad_norm"] > 0
        for name in ("values", "returns"):
            low, mean, high = (row[f"critic/{name}/{kind}"] for kind in ("min", "mean", "max"))
            assert low <= mean <= high
        assert (row["rollout/kl"] == 0.0) is (row["step"] <= 3)
    assert rows[1]["critic/values/max"] == rows[1]["critic/values/min"] == 0.0
    assert rows[2]["critic/values/max"] > rows[2]["critic/values/min"]
    assert rows[3]["train/ratio"] != 1.0  # the mean over two steps, the second off-policy
    assert summary["logprob_mismatches"] == 0 < summary["logprob_tokens_compared"]
    state = latest_checkpoint(ppo.folder / "base" / "checkpoints").load()
    assert (state["step"], state["critic"]["step"]) == (2 * 4, 2 * 6)


def test_memory_that_changes_hands_moves_no_bit(ppo):
    """The critic's gradients go and come with the policy's."""
    memory = ["placement.release_memory=true", "trainer.parallel.recompute=full"]
    _, rows, _ = ppo.train("released", *PPO, *memory, "trainer.num_steps=3")
    assert rows == ppo.result[1][:4]


def test_killed_and_resumed_to_the_same_bytes(ppo, kill_when):
    """In step 4, after a checkpoint of a policy that had waited: policy, critic, both optimizers,
    and what is logged of both."""
    kill_when(ppo.held(45), ["grpo", *ppo.arguments("killed", *PPO)])
    ppo.control.unlink()
    resumed = latest_checkpoint(ppo.folder / "killed" / "checkpoints").load()
    assert (resumed["step"], resumed["critic"]["step"]) == (0, 4)
    assert ppo.train("killed", *PPO, "resume=true") == ppo.result
    checkpoints = (ppo.folder / name / "checkpoints" for name in ("base", "killed"))
    one, other = (latest_checkpoint(folder).manifest["files"] for folder in checkpoints)
    assert one == other  # the digests of their bytes


def test_a_stop_before_anything_is_written_drops_the_step(runs):
    """Of the critic alone; and of the policy with the critic, which steps behind it. In the end the
    policy steps too: every ratio is exactly 1 in its first step, and not in its second."""
    run = runs.resolve("stopped", *PPO)
    polls = []

    def poll():
        polls.append(1)
        raise InterruptedError("now")

    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        rollout, trainer = roll_out(recipe, 0), recipe.trainer
        before = trainer.step, trainer.digest(), trainer.critic.digest()
        for warmup in (2, 0):
            run.critic.warmup_steps = warmup
            with pytest.raises(InterruptedError):
                recipe.update(rollout, PhaseTimer(), poll)
            assert before == (trainer.step, trainer.digest(), trainer.critic.digest())
        assert len(polls) == 2
        run.critic.warmup_steps = 2
        assert recipe.update(rollout, PhaseTimer()) == []
        assert before[2] != trainer.critic.digest()
        run.critic.warmup_steps, ratios, loss = 0, {}, recipe.algorithm.loss

        def watched(inputs):
            ratios.setdefault(trainer.step, []).append(inputs.log_ratio.detach().exp())
            return loss(inputs)

        recipe.algorithm.loss = watched
        recipe.update(rollout, PhaseTimer())
        first, second = (torch.cat(ratios[step]) for step in (0, 1))
        assert first.eq(1).all()
        assert second.ne(1).float().mean() > 0.5


def test_a_critic_of_its_own_folder(runs, tmp_path, demo_model):
    """Other weights of the family; a folder that was moved is no other, one of other sizes is."""
    make_demo_model(tmp_path / "other", seed=9)
    run = runs.resolve("own", *PPO, f"critic.model={tmp_path / 'other'}")
    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        critic = recipe.trainer.critic.params
        for folder, same in ((tmp_path / "other", True), (demo_model, False)):
            with safe_open(folder / "model.safetensors", "pt") as file:
                weights = file.get_tensor("model.embed_tokens.weight")
            assert torch.equal(critic[EMBEDDING][: len(weights)], weights) is same
        assert not critic[OUTPUT].any()
    bound = bindings(run, "grpo", {})
    (tmp_path / "other").rename(tmp_path / "moved")
    run.critic.model = str(tmp_path / "moved")
    assert bindings(run, "grpo", {}) == bound
    config = tmp_path / "moved" / "config.json"
    config.write_text(
        config.read_text().replace('"intermediate_size": 192', '"intermediate_size": 96')
    )
    other = bindings(run, "grpo", {})
    assert {k: v for k, v in other.items() if v != bound[k]}.keys() == {"contents"}
    run.critic.model = None
    assert bindings(run, "grpo", {}) != bound
    assert {key for key, _ in input_files(run)}.isdisjoint({"critic.model"})


def test_a_critic_that_begins_as_a_reward_model(runs, tmp_path, demo_model):
    """A folder with one label is read whole; one with two is refused, at the start."""
    from transformers import AutoModelForSequenceClassification as Rater

    for labels in (1, 2):
        folder = tmp_path / f"{labels}"
        rater = Rater.from_pretrained(demo_model, num_labels=labels, dtype=torch.float32)
        rater.save_pretrained(folder)
        run = runs.resolve("rated", *PPO, f"critic.model={folder}")
        if labels == 2:
            with pytest.raises(ValueError, match="it has 2 labels .*; a value head has 1"):
                describe_grpo(run)
            continue
        describe_grpo(run)
        with closing(GrpoRecipe(run, open_run(run))) as recipe:
            assert torch.equal(recipe.trainer.critic.params[OUTPUT], rater.score.weight)


def test_an_exported_critic_is_one_to_begin_with(ppo, runs, tmp_path, demo_model, capsys):
    """Its bits are those of the checkpoint; transformers reads them too. A run without one has
    none."""
    from transformers import AutoModelForSequenceClassification as Rater

    where = [f"checkpoint={ppo.folder / 'base'}", f"model={demo_model}", f"out={tmp_path / 'out'}"]
    assert main(["export", "critic=true", *where]) == 0
    saved = latest_checkpoint(ppo.folder / "base" / "checkpoints").load()["critic"]["params"]
    run = runs.resolve("again", *PPO, f"critic.model={tmp_path / 'out'}")
    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        params = recipe.trainer.critic.params
        assert params.keys() == saved.keys()
        assert all(torch.equal(params[name], saved[name]) for name in saved)
    rater = Rater.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(rater.score.weight, saved[OUTPUT])
    assert saved[OUTPUT].any()
    with pytest.raises(
        ValueError, match="architectures = .'.*ForSequenceClassification'.; it must"
    ):
        load_model_config(tmp_path / "out")
    runs.train("plain", "trainer.num_steps=1")
    where[0] = f"checkpoint={runs.folder / 'plain'}"
    assert main(["export", "critic=true", *where, "overwrite=true"]) == 2
    assert "the run has no critic; give critic=false" in capsys.readouterr().err


def test_a_critic_of_another_family_or_vocabulary_is_refused(runs, llama_path, tmp_path):
    """Before anything is made, and in a dry run."""
    make_demo_model(tmp_path / "missing", seed=9)
    (tmp_path / "missing" / "model.safetensors").unlink()
    for folder, error, message in (
        (llama_path, ValueError, "critic.model is .*llama.*; it must be a folder whose archit"),
        (tmp_path / "none", FileNotFoundError, "model folder .*none does not exist"),
        (tmp_path / "missing", FileNotFoundError, "safetensors"),
    ):
        with pytest.raises(error, match=message):
            describe_grpo(runs.resolve("other", *PPO, f"critic.model={folder}"))


def test_settings_that_contradict_each_other_are_refused(runs):
    for words, message in (
        (
            ["algorithm=ppo", "critic.warmup_steps=6"],
            "critic.warmup_steps is 6; it must be below 6",
        ),
        (["critic.warmup_steps=1"], "unknown key: critic.warmup_steps"),
        (["algorithm=ppo", "critic.parallel.offload_reference=true"], "unknown key: critic.parall"),
        (["algorithm=ppo", "critic.optimizer.lr=-1"], "critic.optimizer.lr is -1.0; it must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            runs.resolve("wrong", *words)


def test_a_dry_run_counts_the_critic(runs):
    found = describe_grpo(runs.resolve("dry", *PPO))
    assert found["optimizer_steps"] == 2 * 4
    names = ("weights_mib", "optimizer_mib", "critic_weights_mib", "critic_optimizer_mib")
    saved = sum(found[name] for name in (*names, "reference_mib"))
    assert found["checkpoint_on_host_mib"] == pytest.approx(saved, abs=0.5)
    assert found["critic_gradients_mib"] == pytest.approx(found["critic_weights_mib"])
