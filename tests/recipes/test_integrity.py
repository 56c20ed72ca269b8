"""A checkpoint that is damaged, or another run's, is refused before anything is changed."""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers import edit_config, tree
from run_children import open_run

from samebit.recipes.config import ConfigError
from samebit.recipes.run import session
from samebit.trainer.checkpoint import MANIFEST, CheckpointError, latest_checkpoint

RUN = [
    *("algorithm=grpo_kl", "algorithm.kl_coef=0.5", "trainer.num_steps=2"),
    "rollout.partial_tokens=4",  # so that it has a schedule
]


@pytest.fixture(scope="module")
def trained(make_runs, tmp_path_factory):
    """A short run with a reference model. Do not write to its folder."""
    runs = make_runs(tmp_path_factory.mktemp("trained"))
    runs.train("run", *RUN)
    return runs


@pytest.fixture
def run(runs, trained):
    """A copy of it, and its checkpoint."""
    shutil.copytree(trained.folder / "run", runs.folder / "run")
    runs.control = trained.control  # part of the configuration
    return runs, latest_checkpoint(runs.folder / "run" / "checkpoints")


def expect_refusal(runs, message, *overrides):
    """Opening the run raises, and no file of it changes, nor does one appear."""
    before = tree(runs.folder / "run")
    with pytest.raises(CheckpointError, match=message):
        open_run(runs.resolve("run", *RUN, "resume=true", *overrides))
    assert tree(runs.folder / "run") == before


def tensors_of(value, name=""):
    """Every tensor of a nested state, with where it is."""
    if isinstance(value, torch.Tensor):
        yield name, value
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list | tuple) else items
    for key, inner in items:
        yield from tensors_of(inner, f"{name}/{key}")


def places_of_tensors(state, data):
    """An offset in the middle of the bytes of every tensor that is not tiny."""
    found = {}
    for name, tensor in tensors_of(state):
        values = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        if len(values) >= 64:
            found[name] = data.index(values) + len(values) // 2
    return found


def test_one_flipped_bit_anywhere_in_the_state_is_refused(run):
    """Head, tail and every tensor: parameters, both moments of the optimizer, the reference."""
    runs, checkpoint = run
    file = checkpoint.path / "rank_00000.pt"
    data = file.read_bytes()
    tensors = places_of_tensors(checkpoint.load(), data)
    for kind in ("/params/", "/reference/", "exp_avg", "exp_avg_sq"):
        assert any(kind in name for name in tensors), kind
    for place in {0, 1, 100, len(data) // 2, len(data) - 1, *tensors.values()}:
        damaged = bytearray(data)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"rank_00000.pt is damaged: SHA-256"):
            checkpoint.verify()
    expect_refusal(runs, "rank_00000.pt is damaged")


def test_one_flipped_bit_anywhere_in_the_manifest_is_refused(run):
    """It holds counts and rewards, and decides what is looked at."""
    runs, checkpoint = run
    file = checkpoint.path / MANIFEST
    data = file.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged"):
            latest_checkpoint(checkpoint.path.parent)
    expect_refusal(runs, f"{MANIFEST} is damaged")


def test_a_missing_file_is_refused(run):
    """The message names it."""
    runs, checkpoint = run
    (checkpoint.path / "rank_00000.pt").unlink()
    expect_refusal(runs, r"step_00000002/rank_00000.pt is missing")


@pytest.mark.parametrize("name", ["metrics.jsonl", "schedule.jsonl"])
def test_missing_rows_are_refused(run, name):
    """Those of steps before the checkpoint, which a resumed run writes none of again; what is
    behind them is dropped."""
    runs, _ = run
    file = runs.folder / "run" / name
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*rows, '{"step": 3}\n']))
    with open_run(runs.resolve("run", *RUN, "resume=true")) as opened:
        assert opened.resumed.step == 2
    file.write_text("".join(row for row in rows if not row.startswith('{"step": 1,')))
    expect_refusal(runs, f"{name} has no row of step 1; the run goes on after step 2")
    file.write_text("".join(rows[:-1]))
    expect_refusal(runs, f"{name} has no row of step 2; the run goes on after step 2")
    file.unlink()
    expect_refusal(runs, f"{name} has no row of step 1; the run goes on after step 2")


def test_other_numerics_are_refused(run, monkeypatch):
    """A checkpoint of another machine's bits would break the promise without a word."""
    runs, _ = run
    original = session.numerics_profile
    other = lambda *key: replace(original(*key), device_type="abacus")  # noqa: E731
    monkeypatch.setattr(session, "numerics_profile", other)
    message = "another numerics profile, so bits would differ: device_type cpu -> abacus"
    expect_refusal(runs, message)


def test_another_model_at_the_same_path_is_refused(run, tmp_path):
    """A changed config.json, with weights of the same shapes, would compute other bits."""
    runs, _ = run
    model = shutil.copytree(runs.model, tmp_path / "model")
    runs.train("other", *RUN, f"model.path={model}")
    edit_config(model, rms_norm_eps=1e-3)
    with pytest.raises(CheckpointError, match="another model configuration"):
        open_run(runs.resolve("other", *RUN, f"model.path={model}", "resume=true"))


def test_another_configuration_is_refused(run):
    """More of these stand in test_grpo_run."""
    expect_refusal(run[0], "another configuration", "algorithm.kl_coef=0.4")


def test_another_layout_is_refused_unless_asked_for(run):
    """Bits would change without a word; the message says how to want that."""
    split = "trainer.parallel.distributed_optimizer=true"
    message = (
        r"another trainer\.parallel \(distributed_optimizer False -> True\); with reshard=true"
    )
    expect_refusal(run[0], message, split)
    session = open_run(run[0].resolve("run", *RUN, "resume=true", "reshard=true", split))
    assert session.resumed.step == 2
    with pytest.raises(ConfigError, match="reshard is True; it must be false without resume"):
        run[0].resolve("run", *RUN, "reshard=true")
