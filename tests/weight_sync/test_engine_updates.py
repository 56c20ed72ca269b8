"""An engine between two versions: what it takes, what it refuses, and what makes it whole again."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import edit_tensors, outcomes
from serving import PARAMS, PROMPTS, SETTINGS, local_engine, serves

from samebit.recipes.models.tiny_model import write_weights
from samebit.rollout.remote import RemoteEngine
from samebit.weight_sync.transports.alias import AliasLease
from samebit.weight_sync.transports.file import FileTransport
from samebit.weight_sync.transports.remote import GlooTransport
from samebit.weight_sync.types import WeightSyncError, WeightVersion


def test_during_an_update_the_engine_takes_no_work(old):
    """Alias: between begin and commit the optimizer writes the memory that the engine reads."""
    engine = local_engine(old.folder)
    engine.sink.begin(4)
    for call in (
        engine.step,
        lambda: engine.generate(PROMPTS, PARAMS),
        lambda: engine.score(PROMPTS[::2]),
        lambda: engine.add_request(PROMPTS[0], PARAMS),
        lambda: engine.sink.begin(5),
    ):
        with pytest.raises(WeightSyncError, match="step 4"):
            call()


def test_an_update_does_not_begin_while_requests_run(old):
    """Half a completion by the old weights and half by the new would keep no promise."""
    engine = local_engine(old.folder)
    request_id = engine.add_request(PROMPTS[0], PARAMS)
    engine.step()
    with pytest.raises(WeightSyncError, match="1 requests are unfinished"):
        engine.sink.begin(4)
    engine.abort_request(request_id)
    engine.sink.begin(4)


def test_alias_refuses_memory_that_the_engine_does_not_read(old):
    """A trainer that replaced its parameters would train weights that nobody serves."""
    engine = local_engine(old.folder)
    lease = AliasLease(engine.sink)
    lease.lease(1)
    with pytest.raises(WeightSyncError, match="not shared with the engine: "):
        lease.update(old.params, old.digest)
    with pytest.raises(WeightSyncError, match="step 1 broke off: tensors not shared"):
        engine.generate(PROMPTS, PARAMS)
    engine.bind_weights(old.params, step=2)
    assert engine.weight_version == WeightVersion(2, old.digest)
    engine.generate(PROMPTS, PARAMS)


def test_alias_refuses_a_part_of_the_parameters(old):
    """A trainer that forgot one would have the engine serve a version that is none."""
    engine = local_engine(old.folder)
    engine.bind_weights(old.params)
    lease, part = AliasLease(engine.sink), old.without("output_layer.weight")
    lease.lease(1)
    with pytest.raises(WeightSyncError, match="not shared with the engine"):
        lease.update(part, old.digest)
    with pytest.raises(WeightSyncError, match="no update is under way"):
        lease.update(old.params, old.digest)
    with pytest.raises(WeightSyncError, match="step 1 broke off"):
        engine.generate(PROMPTS, PARAMS)
    lease.lease(2)
    version = lease.update(old.params, old.digest)
    assert version == engine.weight_version == WeightVersion(2, old.digest)


def test_bind_weights_refuses_parameters_that_do_not_fit(old):
    """Another model's memory must not be served."""
    engine = local_engine(old.folder)
    for params in (
        old.without("output_layer.weight"),
        {**old.params, "output_layer.weight": torch.zeros(1024, 3)},
        {**old.params, "extra": torch.zeros(1)},
    ):
        with pytest.raises(ValueError, match="parameters do not fit the engine: (output_|extra)"):
            engine.bind_weights(params)


def test_a_direct_update_must_be_full(old, new, expected):
    """A forgotten tensor would leave one of the old version in place."""
    engine = local_engine(old.folder)
    with pytest.raises(WeightSyncError, match="1 tensors never arrived: output_layer.weight"):
        engine.copy_weights(new.without("output_layer.weight"), step=1)
    with pytest.raises(WeightSyncError, match="broke off"):
        engine.generate(PROMPTS, PARAMS)
    engine.copy_weights(new.params, step=2, digest=new.digest)
    assert serves(engine, new, expected)


@pytest.mark.parametrize("way", ["tensor", "disk"])
def test_an_update_that_is_interrupted_at_its_end_has_broken_off(
    old, new, expected, monkeypatch, way
):
    """An engine left in the update for ever would refuse the next one too."""
    engine = local_engine(old.folder)

    def interrupted(_):
        raise KeyboardInterrupt("by the user")

    def update():
        if way == "disk":
            return engine.update_weights_from_disk(new.folder, step=4)
        return engine.copy_weights(new.params, step=4)

    with monkeypatch.context() as patch:
        patch.setattr(engine.weight_control, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            update()
    with pytest.raises(WeightSyncError, match="step 4 broke off: by the user"):
        engine.generate(PROMPTS, PARAMS)
    assert update() == WeightVersion(4, new.digest)
    assert serves(engine, new, expected)


def test_get_weights_by_name_gives_a_copy(old):
    """Writing to what was asked for must not change what is served."""
    engine = local_engine(old.folder)
    name = "decoder.final_layernorm.weight"
    engine.get_weights_by_name(name).zero_()
    assert torch.equal(engine.get_weights_by_name(name), old.params[name])
    assert torch.equal(engine.get_weights_by_name("model.norm.weight"), old.params[name])
    with pytest.raises(KeyError):
        engine.get_weights_by_name("model.norm")


@pytest.mark.parametrize("damage", ["missing folder", "truncated", "missing tensor", "not finite"])
def test_a_bad_folder_is_refused_and_a_good_one_recovers(old, new, expected, tmp_path, damage):
    """Whatever is wrong with a file, the engine says so and does not stay stuck."""
    folder = shutil.copytree(new.folder, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    if damage == "missing folder":
        shutil.rmtree(folder)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing tensor":
        edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    else:
        edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.inf))
    engine = local_engine(old.folder)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the kind depends on the damage
        engine.update_weights_from_disk(folder)
    assert str(folder) in str(caught.value)
    if damage == "not finite":  # found when it was in place
        with pytest.raises(WeightSyncError, match="(?s)broke off: .*full update"):
            engine.generate(PROMPTS, PARAMS)
    else:  # found before anything was written
        assert engine.weight_version.digest == old.digest
        engine.generate(PROMPTS, PARAMS)
    engine.update_weights_from_disk(new.folder)
    assert serves(engine, new, expected)


def test_biases_travel_as_matrices_do(qwen2_path, old, tmp_path):
    """Vectors, interleaved by kv group: in one process, by a folder and to another process."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(qwen2_path / "config.json", other / "config.json")
    write_weights(other, seed=12, std=0.2)
    version = type(old)(other)
    assert any(name.endswith("linear_qkv.bias") for name in version.params)
    truth = outcomes(local_engine(other).generate(PROMPTS, PARAMS))

    direct, by_file = local_engine(qwen2_path), local_engine(qwen2_path)
    assert outcomes(direct.generate(PROMPTS, PARAMS)) != truth
    direct.copy_weights(version.params, step=1, digest=version.digest)
    remote = RemoteEngine(qwen2_path, **SETTINGS)
    source = SimpleNamespace(step=0, params=version.params, specs=version.specs)
    gloo = GlooTransport(source, remote, timeout_s=60)
    load = by_file.update_weights_from_disk
    try:
        for transport in (FileTransport(tmp_path / "weights", version.specs, load), gloo):
            transport.lease(1)
            found = transport.update(version.params, version.digest)
            assert found == WeightVersion(1, version.digest)
        for engine in (direct, by_file, remote):
            assert outcomes(engine.generate(PROMPTS, PARAMS)) == truth
    finally:
        gloo.close()
        remote.close()
