"""samebit export: a checkpoint becomes a folder that others can load."""

import json
import os
import shutil
import stat

import pytest
import torch
from helpers import assert_same_bits, edit_config, tree
from safetensors.torch import load_file

from samebit.recipes import fetch_smollm2
from samebit.recipes.cli.main import main
from samebit.recipes.export import write_model
from samebit.recipes.models.tiny_model import make_demo_model
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.checkpoint import latest_checkpoint, read_checkpoint
from samebit.trainer.checkpoint_writer import CheckpointWriter
from samebit.weight_sync.transports.file import read_version


def export(base, checkpoint, out, *overrides):
    arguments = [f"checkpoint={checkpoint}", f"model={base.model}", f"out={out}", *overrides]
    return main(["export", *arguments])


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


def test_a_run_may_go_on_meanwhile(base, run_copy, tmp_path, monkeypatch):
    """It removes the checkpoint that the export has found, after writing a newer one."""
    newer, older = (run_copy / "checkpoints" / f"step_0000000{step}" for step in (6, 4))
    aside = newer.rename(tmp_path / "aside")

    def go_on(path, family=None, rates=False):
        if aside.exists():
            aside.rename(newer)
            shutil.rmtree(older)
        return load_model_config(path, family, rates)

    monkeypatch.setattr("samebit.recipes.export.load_model_config", go_on)
    assert export(base, run_copy, tmp_path / "out") == 0
    assert read_version(tmp_path / "out").step == 6


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


@pytest.mark.parametrize("name", ["copy", "link"])
def test_a_copy_or_a_link_can_be_exported(base, tmp_path, name):
    """A user keeps the best one under a name of his own."""
    best, own = tmp_path / "step_best", base.folder / "base" / "checkpoints" / "step_00000004"
    if name == "link":
        best.symlink_to(own)
    else:
        shutil.copytree(own, best)
    assert export(base, best, tmp_path / "out") == 0
    assert read_version(tmp_path / "out").step == 4


@pytest.fixture(scope="module")
def bf16_run(base, tmp_path_factory):
    """(checkpoint, model) as a GPU leaves them: bf16 weights, fp32 master weights beside them; the
    folder says so in another way, and holds more than weights."""
    folder = tmp_path_factory.mktemp("bf16")
    state = latest_checkpoint(base.folder / "base" / "checkpoints").load()
    for name, weights in state["params"].items():
        state["optimizer"][name]["master"] = weights.reshape(-1).clone()
    state["params"] = {name: weights.bfloat16() for name, weights in state["params"].items()}
    CheckpointWriter(folder, 1, background=False).save(6, state, {})
    model = shutil.copytree(base.model, folder / "model")
    edit_config(model, torch_dtype="bfloat16")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("x")
    for name in ("consolidated.00.pth", ".samebit", ".secret", "model.onnx"):
        (model / name).write_text("{}")
    (model / "weight_version.json").write_text(json.dumps({"step": 1, "digest": "0" * 16}))
    (model / "README.md").write_text("x")
    (model / "README.md").chmod(0o600)
    return folder / "step_00000006", model


@pytest.mark.parametrize(
    ("asked", "written", "origin"),
    [
        ("auto", torch.bfloat16, "bfloat16, from bfloat16 weights"),
        ("bfloat16", torch.bfloat16, "bfloat16, from bfloat16 weights"),
        ("float32", torch.float32, "float32, from the master weights"),
        ("float16", torch.float16, "float16, from bfloat16 weights"),
    ],
)
def test_the_folder_says_what_was_written(base, bf16_run, tmp_path, capsys, asked, written, origin):
    """from_pretrained takes config.json's word, and has every bit of the file."""
    from transformers import AutoModelForCausalLM

    (checkpoint, model), out = bf16_run, tmp_path / "out"
    arguments = [f"checkpoint={checkpoint}", f"model={model}", f"out={out}", f"dtype={asked}"]
    assert main(["export", *arguments]) == 0
    assert f"{read_version(out).digest}, {origin}\n" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == str(written).removeprefix("torch.")
    assert config.keys() == json.loads((model / "config.json").read_text()).keys()
    tensors, loaded = (
        load_file(out / "model.safetensors"),
        AutoModelForCausalLM.from_pretrained(out),
    )
    assert {tensor.dtype for tensor in tensors.values()} == {written}
    for name, tensor in loaded.state_dict().items():
        if name != "lm_head.weight":  # tied
            assert_same_bits(tensor, tensors[name], name)
    if asked == "float32":
        assert read_version(out).digest == base.result[0]["weights_digest"]
    names = {str(name) for name in tree(out)}
    assert {"README.md", "tokenizer.json", "additional_chat_templates/tool.jinja"} < names
    assert not names & {"consolidated.00.pth", "model.onnx", ".secret"}
    assert read_version(out).step == 6


def test_what_a_dtype_cannot_hold_is_refused(base, tmp_path, capsys):
    """Infinities would be written without a word; and what is no dtype."""
    state = latest_checkpoint(base.folder / "base" / "checkpoints").load()
    state["params"] = {name: weights.clone() for name, weights in state["params"].items()}
    state["params"]["decoder.final_layernorm.weight"][0] = 1e6
    CheckpointWriter(tmp_path, 1, background=False).save(6, state, {})
    out = tmp_path / "out"
    assert export(base, tmp_path, out, "dtype=float16") == 2
    assert "dtype=float16 cannot hold the numbers of decoder.final" in capsys.readouterr().err
    assert export(base, tmp_path, out, "dtype=fp8") == 2
    assert "dtype is 'fp8'; it must be one of ('auto', 'float32'," in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
def test_modes_follow_the_umask(bf16_run, tmp_path, mask, file_mode, folder_mode):
    """Others on the machine are to read what the umask lets them read."""
    before = os.umask(mask)
    try:
        out = tmp_path / "out"
        write_model(read_checkpoint(bf16_run[0]), bf16_run[1], out)
        make_demo_model(tmp_path / "made", 0)
    finally:
        os.umask(before)
    for folder in (out, tmp_path / "made"):
        assert stat.S_IMODE(folder.stat().st_mode) == folder_mode
        for file in folder.rglob("*"):
            expected = folder_mode if file.is_dir() else file_mode
            assert stat.S_IMODE(file.stat().st_mode) == expected, file


def test_what_is_read_is_not_replaced(base, bf16_run, tmp_path, capsys):
    """A model or checkpoint inside the export that is to be overwritten; siblings stay as well."""
    checkpoint, model = bf16_run
    out = tmp_path / "out"
    for name in (".out.old", ".out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    assert export(base, checkpoint, out, f"model={model}") == 0
    inside = shutil.copytree(model, out / "model")
    kept = shutil.copytree(checkpoint, out / "step_best")
    for where in ([f"model={inside}"], [f"checkpoint={kept}"]):
        key = where[0].partition("=")[0]
        assert export(base, checkpoint, out, "overwrite=true", *where) == 2
        assert f"{key} is to be read from {out}/" in capsys.readouterr().err
    assert export(base, checkpoint, out, f"model={model}", "overwrite=true") == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".out.old", ".out.tmp"}
    assert (tmp_path / ".out.tmp" / "precious").exists()


def test_fetching_replaces_only_what_it_wrote(monkeypatch, tmp_path, capsys):
    """A stand-in for the conversion: the folder's rules are the same."""

    def write_folder(gguf, folder):
        make_demo_model(folder, 0)
        return 7

    monkeypatch.setattr(fetch_smollm2, "write_folder", write_folder)
    gguf, out = tmp_path / "x.gguf", tmp_path / "out"
    gguf.touch()
    fetch = ["fetch-smollm2", f"gguf={gguf}", f"out={out}"]
    assert main(fetch) == 0
    assert main(fetch) == 2
    assert "is not empty; give another folder or overwrite=true" in capsys.readouterr().err
    (out / "leftover.safetensors").touch()
    assert main([*fetch, "overwrite=true"]) == 0
    assert not (out / "leftover.safetensors").exists()
    inside = shutil.copy(gguf, out)
    assert main([*fetch, f"gguf={inside}", "overwrite=true"]) == 2
    assert "gguf is to be read from" in capsys.readouterr().err
    (out / ".samebit").unlink()
    assert main([*fetch, "overwrite=true"]) == 1
    assert "no export made it, so nothing there is replaced" in capsys.readouterr().err


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
    assert main(["export", *arguments, f"out={tmp_path / 'out'}"]) == 2
    assert str(qwen3_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
