"""One contract for all transports: they deliver what a direct update delivers, to the bit."""

import shutil

import pytest
import torch
from helpers import edit_tensors, outcomes

from samebit.recipes.models.tiny_model import write_weights
from samebit.rollout.engine import Engine
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.transports.alias import AliasTransport
from samebit.weight_sync.transports.collective import CollectiveSender
from samebit.weight_sync.transports.file import FileTransport
from samebit.weight_sync.types import WeightSyncError, WeightVersion

PROMPTS = [[5, 9, 200, 31], [7], [5, 9, 200, 31, 8, 8]]
PARAMS = SamplingParams(n=2, max_new_tokens=12, ignore_eos=True)


def local_engine(folder):
    return Engine(folder, device="cpu", kv_cache_tokens=1024)


class Alias:
    """The trainer writes the engine's memory between begin and send."""

    def __init__(self, request):
        version = request.getfixturevalue("old")
        self.memory = {name: p.clone() for name, p in version.params.items()}
        self.engine = local_engine(version.folder)
        self.engine.bind_weights(self.memory)
        self._transport = AliasTransport(self.engine)
        self.begin, self.commit = self._transport.begin, self._transport.commit
        self.abort = self._transport.abort

    def send(self, params):
        for name, p in params.items():
            self.memory[name].copy_(p)
        self._transport.send(self.memory)


class Gloo:
    """Broadcasts to another process."""

    def __init__(self, request):
        self.engine = request.getfixturevalue("remote")
        transport = request.getfixturevalue("gloo")
        self.begin, self.send = transport.begin, transport.send
        self.commit, self.abort = transport.commit, transport.abort


class File:
    """A folder on disk."""

    def __init__(self, request):
        version, tmp_path = request.getfixturevalue("old"), request.getfixturevalue("tmp_path")
        self.engine = local_engine(version.folder)
        load = self.engine.update_weights_from_disk
        transport = FileTransport(tmp_path / "weights", version.specs, load)
        self.begin, self.send = transport.begin, transport.send
        self.commit, self.abort = transport.commit, transport.abort


@pytest.fixture(params=[Alias, Gloo, File], ids=["alias", "gloo", "file"])
def sender(request):
    return request.param(request)


@pytest.fixture(scope="module")
def expected(old, new):
    """Outcomes of both versions by a direct update in one process."""
    engine = local_engine(old.folder)
    found = {}
    for version in (new, old):
        engine.update_weights_from_tensor(version.params, step=1, digest=version.digest)
        found[version.digest] = (
            outcomes(engine.generate(PROMPTS, PARAMS)),
            engine.score(PROMPTS[::2], 0.7),
        )
    return found


def send(sender, version, step):
    sender.begin(step)
    sender.send(version.params)
    return sender.commit(version.digest)


def serves(engine, version, expected):
    found = outcomes(engine.generate(PROMPTS, PARAMS)), engine.score(PROMPTS[::2], 0.7)
    return found == expected[version.digest]


def test_every_transport_gives_the_bits_of_a_direct_update(sender, old, new, expected):
    """Tokens and log-probs after a sync must not tell which way the weights came."""
    for step, version in enumerate((new, old, new), start=1):
        assert send(sender, version, step) == WeightVersion(step, version.digest)
        now = sender.engine.weight_version
        assert now == WeightVersion(step, version.digest)
        assert serves(sender.engine, version, expected)
        [[completion, _]] = sender.engine.generate(PROMPTS[:1], PARAMS)
        assert [span.version for span in completion.version_spans] == [now]


def test_a_fresh_engine_on_the_same_weights_agrees(new, expected):
    """Loading a folder and receiving an update must be the same thing."""
    engine = local_engine(new.folder)
    assert engine.weight_version == WeightVersion(0, new.digest)
    assert serves(engine, new, expected)


def test_a_wrong_digest_is_refused_with_both_values_and_a_full_update_recovers(
    sender, old, new, expected
):
    """The sender must learn that the receiver does not hold its weights."""
    sender.begin(8)
    sender.send(new.params)
    with pytest.raises(WeightSyncError, match=f"digest {new.digest} here, {old.digest} at"):
        sender.commit(old.digest)
    with pytest.raises(WeightSyncError, match=f"step 8 broke off: digest {new.digest} here"):
        sender.engine.generate(PROMPTS, PARAMS)
    with pytest.raises(WeightSyncError, match="broke off"):
        sender.engine.score(PROMPTS[::2])
    send(sender, new, 9)
    assert serves(sender.engine, new, expected)


def test_not_a_number_is_refused_by_name(sender, old, new, expected):
    """NaN weights must be found before they are served."""
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    sender.begin(8)
    sender.send(new.changed(name, torch.nan))
    with pytest.raises((WeightSyncError, ValueError), match="NaN or Inf in"):
        sender.commit(new.digest)
    with pytest.raises(WeightSyncError, match="step 8 broke off: .*NaN or Inf in"):
        sender.engine.generate(PROMPTS, PARAMS)
    send(sender, old, 9)
    assert serves(sender.engine, old, expected)


def test_after_an_abort_nothing_half_done_is_served(sender, old, new, expected):
    """An engine either refuses with the sender's reason, or still holds the old version whole."""
    send(sender, old, 1)
    sender.begin(2)
    sender.abort("the optimizer failed")
    if isinstance(sender, Alias):  # the optimizer may have written the shared memory
        with pytest.raises(WeightSyncError, match="step 2 broke off: the optimizer failed"):
            sender.engine.generate(PROMPTS, PARAMS)
    else:  # the engine was not reached yet
        assert serves(sender.engine, old, expected)
    sender.begin(2)
    sender.send(new.params)
    sender.abort("the optimizer failed")
    if isinstance(sender, File):  # nothing reaches the engine before commit
        assert serves(sender.engine, old, expected)
    else:
        with pytest.raises(WeightSyncError, match="step 2 broke off: the optimizer failed"):
            sender.engine.generate(PROMPTS, PARAMS)
    send(sender, new, 3)
    assert serves(sender.engine, new, expected)


def test_what_was_refused_or_given_up_may_be_given_up_again(gloo, remote, old, new, monkeypatch):
    """The engine does not listen any more: nothing is sent, or the answer would never come."""

    def abort_again(reason):
        with monkeypatch.context() as patch:
            patch.delattr(CollectiveSender, "abort")
            gloo.abort(reason)

    gloo.begin(8)
    gloo.send(new.params)
    with pytest.raises(WeightSyncError, match="digest"):
        gloo.commit(old.digest)
    abort_again("it was refused")
    send(gloo, new, 9)
    gloo.begin(10)
    gloo.send(old.params)
    gloo.abort("the optimizer failed")
    abort_again("the optimizer failed")
    assert send(gloo, old, 11) == remote.weight_version == WeightVersion(11, old.digest)


def test_during_an_update_the_engine_takes_no_work(old):
    """Alias: between begin and commit the optimizer writes the memory that the engine reads."""
    engine = local_engine(old.folder)
    engine.begin_weight_update(4)
    for call in (
        engine.step,
        lambda: engine.generate(PROMPTS, PARAMS),
        lambda: engine.score(PROMPTS[::2]),
        lambda: engine.add_request(PROMPTS[0], PARAMS),
        lambda: engine.begin_weight_update(5),
    ):
        with pytest.raises(WeightSyncError, match="step 4"):
            call()


def test_an_update_does_not_begin_while_requests_run(old):
    """Half a completion by the old weights and half by the new would keep no promise."""
    engine = local_engine(old.folder)
    request_id = engine.add_request(PROMPTS[0], PARAMS)
    engine.step()
    with pytest.raises(WeightSyncError, match="1 requests are unfinished"):
        engine.begin_weight_update(4)
    engine.abort_request(request_id)
    engine.begin_weight_update(4)


def test_alias_refuses_memory_that_the_engine_does_not_read(old):
    """A trainer that replaced its parameters would train weights that nobody serves."""
    engine = local_engine(old.folder)
    transport = AliasTransport(engine)
    transport.begin(1)
    with pytest.raises(WeightSyncError, match="not shared with the engine: "):
        transport.send(old.params)
    with pytest.raises(WeightSyncError, match="step 1 broke off: tensors not shared"):
        engine.generate(PROMPTS, PARAMS)
    engine.bind_weights(old.params, step=2)
    assert engine.weight_version == WeightVersion(2, old.digest)
    engine.generate(PROMPTS, PARAMS)


def test_alias_refuses_a_part_of_the_parameters(old):
    """A trainer that forgot one would have the engine serve a version that is none."""
    engine = local_engine(old.folder)
    engine.bind_weights(old.params)
    transport, part = AliasTransport(engine), old.without("output_layer.weight")
    transport.begin(1)
    with pytest.raises(WeightSyncError, match="not shared with the engine"):
        transport.send(part)
    with pytest.raises(WeightSyncError, match="no update is under way"):
        transport.commit(old.digest)
    with pytest.raises(WeightSyncError, match="step 1 broke off"):
        engine.generate(PROMPTS, PARAMS)
    transport.begin(2)
    transport.send(old.params)
    assert transport.commit(old.digest) == engine.weight_version == WeightVersion(2, old.digest)


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
        engine.update_weights_from_tensor(new.without("output_layer.weight"), step=1)
    with pytest.raises(WeightSyncError, match="broke off"):
        engine.generate(PROMPTS, PARAMS)
    engine.update_weights_from_tensor(new.params, step=2, digest=new.digest)
    assert serves(engine, new, expected)


def test_get_weights_by_name_gives_a_copy(old):
    """Writing to what was asked for must not change what is served."""
    engine = local_engine(old.folder)
    name = "decoder.final_layernorm.weight"
    engine.get_weights_by_name(name).zero_()
    assert torch.equal(engine.get_weights_by_name(name), old.params[name])
    with pytest.raises(KeyError):
        engine.get_weights_by_name("model.norm.weight")


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
    direct.update_weights_from_tensor(version.params, step=1, digest=version.digest)
    remote = RemoteEngine(qwen2_path, device="cpu", kv_cache_tokens=1024)
    gloo = remote.connect_weights("gloo", timeout_s=60)
    load = by_file.update_weights_from_disk
    try:
        for transport in (FileTransport(tmp_path / "weights", version.specs, load), gloo):
            transport.begin(1)
            transport.send(version.params)
            assert transport.commit(version.digest) == WeightVersion(1, version.digest)
        for engine in (direct, by_file, remote):
            assert outcomes(engine.generate(PROMPTS, PARAMS)) == truth
    finally:
        gloo.close()
        remote.close()
