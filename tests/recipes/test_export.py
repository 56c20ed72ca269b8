"""samebit export: a checkpoint becomes a folder that others can load."""

import shutil

import pytest
import torch

from samebit.recipes import cli
from samebit.rollout.engine import Engine
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.weight_sync.transports.file import read_version


def export(base, checkpoint, out, *overrides):
    arguments = [f"checkpoint={checkpoint}", f"model={base.model}", f"out={out}", *overrides]
    return cli.main(["export", *arguments])


@pytest.fixture
def run_copy(base, tmp_path):
    """A copy of a finished run that a test may damage."""
    return shutil.copytree(base.folder / "base", tmp_path / "run")


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000006"])
def test_the_newest_checkpoint_is_exported(base, tmp_path, capsys, place):
    """Named by its run, its checkpoints folder, or itself: the digest of the summary."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert export(base, base.folder / "base" / place, out) == 0
    digest = base.result[0]["weights_digest"]
    assert f"weights of step 6, digest {digest}" in capsys.readouterr().out
    engine = Engine(out, device="cpu")
    assert (engine.weight_version.step, engine.weight_version.digest) == (6, digest)
    ids = AutoTokenizer.from_pretrained(out).encode("12=21")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    assert torch.allclose(torch.tensor(engine.score([ids])[0]), expected, atol=1e-4, rtol=0)


def test_an_older_checkpoint_can_be_named(base, tmp_path):
    """Exactly that one, not the newest."""
    folder = base.folder / "base" / "checkpoints" / "step_00000004"
    assert export(base, folder, tmp_path / "out") == 0
    version = read_version(tmp_path / "out")
    assert version.step == 4
    assert version.digest != base.result[0]["weights_digest"]


def test_a_folder_in_use_is_kept(base, tmp_path, capsys):
    """Nothing is replaced unless overwrite=true says so."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert export(base, base.folder / "base", out) in (1, 2)
    assert "is not empty; give another folder or overwrite=true" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["precious"]
    assert export(base, base.folder / "base", out, "overwrite=true") in (1, 2)
    assert "no export made it, so overwrite=true removes nothing" in capsys.readouterr().err
    (out / "precious").unlink()
    assert export(base, base.folder / "base/checkpoints/step_00000004", out) == 0
    (out / "precious").write_text("x")
    assert export(base, base.folder / "base", out, "overwrite=true") == 0
    assert not (out / "precious").exists()
    assert export(base, base.folder / "base", out, f"model={out}", "overwrite=true") in (1, 2)
    assert "give another folder" in capsys.readouterr().err
    assert read_version(out).digest == base.result[0]["weights_digest"]


def test_no_checkpoint_there(base, tmp_path, capsys):
    """The message names the path that was given."""
    assert export(base, tmp_path, tmp_path / "out") in (1, 2)
    assert f"checkpoint={tmp_path}: no whole checkpoint there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(base, run_copy, tmp_path, capsys):
    """Its digest is checked first."""
    file = latest_checkpoint(run_copy / "checkpoints").path / "rank_00000.pt"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)
    assert export(base, run_copy, tmp_path / "out") == 1
    assert "rank_00000.pt is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_model_is_refused(base, qwen3_path, tmp_path, capsys):
    """Weights under a config that is not theirs would load nowhere."""
    arguments = [f"checkpoint={base.folder / 'base'}", f"model={qwen3_path}"]
    assert cli.main(["export", *arguments, f"out={tmp_path / 'out'}"]) == 2
    assert str(qwen3_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
