"""PPO runs whose critic has a layout of its own: figures, checkpoints, resharding, refusals."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file

from samebit.recipes.cli.dry_run import describe_grpo
from samebit.recipes.cli.main import main
from samebit.recipes.models.tiny_model import make_demo_model, write_weights
from samebit.recipes.run.binding import binding_layout, bound_keys, changes, saved_layout
from samebit.recipes.run.metrics import read_rows
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.trainer.critic.value_model import VALUE_HEAD

PPO = ["algorithm=ppo", "trainer.batch_size=6", "trainer.num_steps=2", "trainer.checkpoint_every=1"]
PPO += ["critic.optimizer.lr=1e-3", "trainer.micro_batch_tokens=200"]  # all of a step in one
TENSOR = ["trainer.parallel.tensor=2", "trainer.parallel.sequence=true"]
COPIES = ["critic.parallel.tensor=1", "critic.parallel.sequence=false", "critic.parallel.data=2"]


@pytest.fixture(scope="module")
def two(make_runs, run_ranks, tmp_path_factory):
    """Two processes: two(name, *words) trains a tensor parallel run, and gives what its ranks end
    with and say. `own` is there, whose critic has two copies."""
    runs = make_runs(tmp_path_factory.mktemp("two"))

    def train(name, *words):
        return run_ranks(runs.arguments(name, *PPO, *TENSOR, *words))

    train.runs, train.folder = runs, runs.folder
    codes, said = train("own", *COPIES)
    assert codes == [0, 0], said
    return train


def result_of(two, name):
    """Summary, metrics without times, samples."""
    folder = two.folder / name
    summary = json.loads((folder / "summary.json").read_text())
    return summary, two.runs.rows(name), read_rows(folder / "samples.jsonl")


def before_the_last_step(two, name):
    """Copy the folder of `own` as it was when its last step had not begun."""
    folder = shutil.copytree(two.folder / "own", two.folder / name)
    shutil.rmtree(folder / "checkpoints" / "step_00000002")
    (folder / "summary.json").unlink()


def exported_critic(two, name, out):
    """The tensors of a run's critic, which `samebit export` has put together."""
    where = [f"checkpoint={two.folder / name}", f"model={two.runs.model}", f"out={out}"]
    assert main(["export", "critic=true", *where]) == 0
    return load_file(out / "model.safetensors")


def test_it_goes_on_under_another_layout_where_it_is_asked_to(two, capsys, tmp_path):
    """The critic's alone is another; without reshard=true it is refused, by its keys, in a dry run
    too. Figures and weights are those of the layout before, up to the order of sums."""
    before_the_last_step(two, "moved")
    words = two.runs.arguments("moved", *PPO, *TENSOR, "resume=true", "dry_run=true")
    assert main(["grpo", *words]) == 1
    changed = "critic.parallel.tensor 1 -> 2, critic.parallel.sequence False -> True, "
    changed += "critic.parallel.data 2 -> 1"
    refused = f"was written under another critic.parallel ({changed}); with reshard=true the run"
    assert refused in capsys.readouterr().err
    codes, said = two("moved", "resume=true", "reshard=true")
    assert codes == [0, 0], said
    assert said.count(f"is resharded ({changed}): bits are those of the new layout") == 1
    [resharded] = latest_checkpoint(two.folder / "moved" / "checkpoints").manifest["resharded"]
    assert resharded == {"step": 1, "changes": changed}
    assert two.runs.rows("moved")[:2] == two.runs.rows("own")[:2]
    assert_same_run(two, "moved", tmp_path)


def assert_same_run(two, name, out):
    """Its values, losses, norms, samples and weights are those of `own`, up to the order of
    sums."""
    (_, rows, drawn), (summary, own, also_drawn) = result_of(two, name), result_of(two, "own")
    assert summary["logprob_mismatches"] == 0 < summary["logprob_tokens_compared"]
    assert [x["completion"] for x in drawn] == [x["completion"] for x in also_drawn]
    for row, other in zip(rows, own, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert own[2]["critic/values/max"] > own[2]["critic/values/min"]
    found, weights = (exported_critic(two, x, out / x) for x in (name, "own"))
    first = load_file(Path(two.runs.model) / "model.safetensors")
    assert found.keys() == weights.keys() == {*first, VALUE_HEAD}
    for key, weight in weights.items():
        assert (found[key] - weight).norm() < 1e-5 * weight.norm(), key
        moved = weight - first[key] if key in first else weight
        assert moved.norm() > 1e-3 * weight.norm(), key


@pytest.mark.long
def test_its_figures_are_those_of_the_policys_layout(two, tmp_path):
    """From the first step on."""
    codes, said = two("same")
    assert codes == [0, 0], said
    assert_same_run(two, "same", tmp_path)


@pytest.mark.long
def test_it_goes_on_to_the_same_bytes(two):
    """Rollouts, metrics and both models' parts of the checkpoint."""
    before_the_last_step(two, "again")
    codes, said = two("again", *COPIES, "resume=true")
    assert codes == [0, 0], said
    assert result_of(two, "again") == result_of(two, "own")
    folders = (two.folder / name / "checkpoints" for name in ("own", "again"))
    one, other = (latest_checkpoint(folder).manifest["files"] for folder in folders)
    assert one == other


def test_what_a_dry_run_says_of_it(runs):
    """What it takes of a process, and which layout it has."""
    same, own = (describe_grpo(runs.resolve("dry", *PPO, *TENSOR, *x)) for x in ([], COPIES))
    assert own["critic_weights_mib"] == pytest.approx(2 * same["critic_weights_mib"], abs=0.1)
    assert own["weights_mib"] == same["weights_mib"]
    assert own["critic_layout"] == "tensor x pipeline x context x data = 1 x 1 x 1 x 2"
    split = "critic.parallel.distributed_optimizer=true"
    part = describe_grpo(runs.resolve("dry", *PPO, *TENSOR, *COPIES, split))
    assert own["critic_optimizer_mib"] == pytest.approx(2 * part["critic_optimizer_mib"], abs=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["critic.parallel.data=2"],
            "critic.parallel is 'tensor x pipeline x context x data = 2 x",
        ),
        (COPIES[:1], "critic.parallel.sequence is True; it must be false where critic.parallel.t"),
        ([*COPIES, "critic.parallel.recompute=all"], "critic.parallel.recompute is 'all'; it must"),
        (["critic.parallel.pipeline=0"], "critic.parallel.pipeline is 0; it must be at least 1"),
        ([*COPIES, "trainer.batch_size=1"], "critic.parallel.data is 2; it must be at most 1"),
        (
            [*COPIES[:2], "trainer.parallel.data=2", "critic.parallel.data=4"]
            + ["rollout.dynamic_sampling=true", "rollout.too_few_groups=train"],
            "critic.parallel.data is 4; it must be at most 2, the samples that too few groups may",
        ),
        (
            ["trainer.parallel.data=3", "critic.parallel.tensor=3", "critic.parallel.data=2"],
            "critic.parallel.tensor is 3: ",
        ),
        (
            ["trainer.parallel.data=3", "critic.parallel.tensor=3", "critic.parallel.data=2"]
            + ["numerics.tp_invariant=true"],
            "critic.parallel.tensor is 3; it must be 1, 2, 4 or 8 with tp_invariant",
        ),
        (
            [*COPIES[:2], "trainer.parallel.data=5", "critic.parallel.pipeline=10"]
            + ["critic.parallel.data=1"],
            "critic.parallel.pipeline is 10; it must divide the model's",
        ),
    ],
)
def test_what_it_cannot_be_is_refused(runs, capsys, words, message):
    """In a dry run, with the key."""
    assert main(["grpo", *runs.arguments("dry", *PPO, *TENSOR, *words, "dry_run=true")]) > 0
    assert message in capsys.readouterr().err


def make_deep_model(folder):
    """The demo's model, with a layer more than that of the runs here."""
    make_demo_model(folder, seed=9)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    write_weights(folder, seed=9)


def test_a_folder_that_its_policys_layout_does_not_fit(runs, capsys, tmp_path):
    """The key is the critic's, though nothing of it is set: what fits may be given there."""
    make_deep_model(tmp_path / "deep")
    words = [*PPO, "trainer.parallel.pipeline=2", "placement.transport=stages", "dry_run=true"]
    words += [f"critic.model={tmp_path / 'deep'}"]
    assert main(["grpo", *runs.arguments("dry", *words)]) == 1
    said = "critic.parallel.pipeline is 2; it must divide the model's 3 layers"
    assert said in capsys.readouterr().err
    words += ["critic.parallel.pipeline=1", "critic.parallel.data=2"]
    assert main(["grpo", *runs.arguments("dry", *words)]) == 0


def test_what_checkpoints_know_of_it(runs):
    """Its layout is no part of the configuration that is bound, and is said in full: what is as the
    policy's is the same whether it was given or not. Earlier checkpoints do not say it."""
    plain, given = (
        runs.resolve("run", *PPO, *TENSOR, *words) for words in ([], ["critic.parallel.tensor=2"])
    )
    layout = binding_layout(plain)
    assert binding_layout(given) == layout
    assert layout["critic.parallel.sequence"] is True
    assert not any(key.startswith("critic.parallel") for key in bound_keys(given))
    earlier = {key: value for key, value in layout.items() if not key.startswith("critic.")}
    assert saved_layout(SimpleNamespace(manifest={"parallel": earlier})) == layout
    own = binding_layout(runs.resolve("run", *PPO, *TENSOR, *COPIES))
    assert changes(layout, own).startswith("critic.parallel.tensor 2 -> 1, ")
    free = ["critic.parallel.recompute=full", "critic.parallel.offload_optimizer=true"]
    assert binding_layout(runs.resolve("run", *PPO, *TENSOR, *free)) == layout


def test_a_layout_that_is_given_is_no_difference_where_it_is_the_policys(runs, capsys):
    """Between runs; nor is the section that earlier runs did not have."""
    for name, words in (("plain", []), ("given", ["critic.parallel.tensor=1"])):
        runs.train(name, *PPO, *words, "trainer.num_steps=1")
    file = runs.folder / "plain" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    assert set(config["critic"].pop("parallel").values()) == {None}
    file.write_text(yaml.safe_dump(config))
    assert main(["diff", f"a={file.parent}", f"b={runs.folder / 'given'}"]) == 0
    assert "config:" not in capsys.readouterr().out
