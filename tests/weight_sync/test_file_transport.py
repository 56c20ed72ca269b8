"""Folders of weights: whole or absent, whatever kills the writer, and readable by transformers."""

import json
import os
import shutil

import pytest
import torch
from crashing_disk import CrashingDisk
from helpers import run_python
from safetensors.torch import load_file

from samebit.rollout.engine import Engine
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.mapping import plain
from samebit.weight_sync.transports.file import FileTransport, read_version, write_hf_folder
from samebit.weight_sync.types import WeightSyncError, WeightVersion

# Dies just before the rename.
DYING_WRITER = """
import os, sys
from pathlib import Path
import torch
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_safetensors
from samebit.weight_sync.transports.file import write_hf_folder
from samebit.weight_sync.types import WeightVersion

source, target = Path(sys.argv[1]), Path(sys.argv[2])
specs = load_model_config(source).param_specs()
params = {spec.name: torch.empty(spec.shape) for spec in specs}
load_safetensors(source, specs, params)

def side_files():
    yield source / "config.json"
    os._exit(0)

write_hf_folder(target, specs, params, WeightVersion(2, "x"), side_files())
"""


def write(folder, version, step, **limits):
    files = [version.folder / "config.json"]
    found = WeightVersion(step, version.digest)
    write_hf_folder(folder, version.specs, version.params, found, files, **limits)
    return found


def test_an_interrupted_write_leaves_the_old_folder_whole(old, new, tmp_path):
    """The folder is the recovery copy: a killed writer must not cost the version it replaces."""
    folder = tmp_path / "weights"
    version = write(folder, old, 1)
    run_python(DYING_WRITER, new.folder, folder)
    assert read_version(folder) == version
    engine = Engine(folder, device="cpu", kv_cache_tokens=1024)
    assert engine.weight_version == version
    after = write(folder, new, 3)
    assert engine.update_weights_from_disk(folder) == after
    assert [p.name for p in tmp_path.iterdir()] == ["weights"], "leftovers of the killed writer"


def test_a_folder_in_other_hands_has_no_version(old, tmp_path):
    """A plain Hugging Face folder starts at step 0; only our own carries a version."""
    assert read_version(old.folder) is None
    folder = shutil.copytree(old.folder, tmp_path / "model")
    (folder / "weight_version.json").write_text(json.dumps({"step": 7, "digest": "f" * 16}))
    engine = Engine(folder, device="cpu", kv_cache_tokens=1024)
    assert engine.weight_version == WeightVersion(0, old.digest), "a version of other weights"


def test_a_folder_in_other_hands_is_not_replaced(old, tmp_path):
    """Neither by an export nor by a transport."""
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="no export made it, so nothing there is replaced"):
        write(folder, old, 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "thesis.tex"]


def test_an_export_of_before_there_were_markers_is_ours(tmp_path):
    """Its version says so."""
    specs, params = [plain("a", "hf.a", (3, 2))], {"a": torch.zeros(3, 2)}
    write_hf_folder(tmp_path / "out", specs, params, WeightVersion(1, "x"))
    (tmp_path / "out" / ".samebit").unlink()
    write_hf_folder(tmp_path / "out", specs, params, WeightVersion(2, "x"))
    assert read_version(tmp_path / "out") == WeightVersion(2, "x")


def test_shards_are_filled_to_the_limit(tmp_path):
    """24 + 8 bytes, then 12: as the index says, with the size of all."""
    specs = [plain(name, f"hf.{name}", (size,)) for name, size in (("a", 6), ("b", 2), ("c", 3))]
    params = {spec.name: torch.ones(spec.shape) for spec in specs}
    write_hf_folder(tmp_path / "out", specs, params, WeightVersion(1, "x"), (), 32)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert index["weight_map"] == {"hf.a": first, "hf.b": first, "hf.c": second}
    assert index["metadata"] == {"total_size": 44}
    write_hf_folder(tmp_path / "out", specs, params, WeightVersion(1, "x"), (), 44)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == index["weight_map"].keys()


def test_weights_changed_behind_the_version_file_are_refused(old, new, tmp_path):
    """The version file promises a digest; other bytes beside it are damage."""
    folder = tmp_path / "weights"
    write(folder, new, 5)
    shutil.copy(old.folder / "model.safetensors", folder)
    engine = Engine(old.folder, device="cpu", kv_cache_tokens=1024)
    message = f"digest {old.digest} here, {new.digest} at the sender"
    with pytest.raises(WeightSyncError, match=message):
        engine.update_weights_from_disk(folder)


def test_the_transport_refuses_a_receiver_that_loaded_something_else(old, new, tmp_path):
    """A receiver that reads another folder would serve other weights under this version."""
    transport = FileTransport(tmp_path / "w", old.specs, lambda _: WeightVersion(1, old.digest))
    transport.begin(1)
    transport.send(new.params)
    with pytest.raises(WeightSyncError, match="the receiver holds"):
        transport.commit(new.digest)


@pytest.mark.parametrize("max_shard_bytes", [5 << 30, 40_000])
@pytest.mark.parametrize("model", ["qwen3_path", "llama_path", "qwen2_path"])
def test_an_exported_folder_loads_in_transformers(request, tmp_path, model, max_shard_bytes):
    """Others must get the model that was trained: same names, same values, same log-probs."""
    from transformers import AutoModelForCausalLM

    engine = Engine(request.getfixturevalue(model), device="cpu", kv_cache_tokens=1024)
    folder = tmp_path / "export"
    files = [engine.model_path / "config.json"]
    specs, version = engine.model_config.param_specs(), engine.weight_version
    write_hf_folder(folder, specs, engine.weights, version, files, max_shard_bytes)
    assert len(list(folder.glob("*.safetensors"))) == 1 or max_shard_bytes == 40_000
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [5, 300, 17, 17, 81, 2, 330, 44]
    with torch.no_grad():
        logprobs = hf(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    assert torch.allclose(torch.tensor(engine.score([ids])[0]), expected, rtol=0, atol=1e-4)
    again = Engine(folder, device="cpu", kv_cache_tokens=1024)
    assert again.weight_version == version
    assert again.score([ids]) == engine.score([ids])


def test_dead_at_any_instant(tmp_path, monkeypatch):
    """An export's folder and the file transport's: the weights of one version with its files and
    its version, whole; what was committed is there."""
    specs = [plain("a", "hf.a", (3, 2)), plain("b", "hf.b", (2,))]
    side = tmp_path / "config.json"
    side.write_text("{}")
    disk = CrashingDisk(tmp_path / "disk")
    out = disk.folder / "new" / "weights"
    versions = []

    def params_of(step):
        return {spec.name: torch.full(spec.shape, float(step)) for spec in specs}

    def load(folder):
        versions.append(read_version(folder))
        return versions[-1]

    with disk.recording():
        for step in (1, 2):
            digest, params = weights_digest(specs, params_of(step)), params_of(step)
            write_hf_folder(out, specs, params, WeightVersion(step, digest), [side], 20)
            disk.report(step)
        transport = FileTransport(out, specs, load)
        transport.begin(3)
        transport.send(params_of(3))
        transport.commit(weights_digest(specs, params_of(3)))
        disk.report(3)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what follows need not wait
    seen = set()
    for crash in disk.crashes(tmp_path / "after"):
        folder = crash.folder / "new" / "weights"
        step = 0
        if folder.exists():
            step = read_version(folder).step
            tensors = {}
            for file in folder.glob("*.safetensors"):
                tensors |= load_file(file)
            assert tensors.keys() == {"hf.a", "hf.b"}, crash.what
            assert all((tensor == step).all() for tensor in tensors.values()), crash.what
            if step < 3:
                assert (folder / side.name).read_text() == "{}", crash.what
                index = json.loads((folder / "model.safetensors.index.json").read_text())
                assert index["weight_map"].keys() == tensors.keys(), crash.what
        assert step in (len(crash.reported), len(crash.reported) + 1), crash.what
        seen.add(step)
    assert seen == {0, 1, 2, 3}
    assert [version.step for version in versions] == [3]
