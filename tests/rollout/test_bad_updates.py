"""Bad updates of an engine's weights: refused with their reason, and a full one makes it whole."""

import math
from unittest.mock import Mock

import pytest
import torch
from helpers import edit_tensors, make_prompts, outcomes

from samebit.rollout.engine import Engine
from samebit.rollout.runtime.sampler import NonFiniteError
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import WeightSyncError

PROMPTS = make_prompts(5, 40)
PARAMS = SamplingParams(n=2, max_new_tokens=6, ignore_eos=True)


SPARSE, META = torch.eye(2).to_sparse(), torch.empty(2, device="meta")


@pytest.fixture(scope="module")
def truth(make_engine):
    return outcomes(make_engine().generate(PROMPTS, PARAMS))


@pytest.fixture
def updated(make_engine, truth):
    """An engine for updates that go wrong; afterwards a full update must make it whole."""
    engine = make_engine()
    good = {name: p.clone() for name, p in engine.weights.items()}
    yield engine
    engine.copy_weights(good, step=50)
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == truth


def refuses(engine, why):
    """Every way of generating is refused, with the reason."""
    calls = (
        lambda: engine.generate(PROMPTS, PARAMS),
        lambda: engine.score(PROMPTS),
        lambda: engine.add_request(PROMPTS[0]),
        engine.step,
    )
    for call in calls:
        with pytest.raises(WeightSyncError, match=why):
            call()
    assert not engine.has_unfinished_requests


def copies(engine):
    return {name: p.clone() for name, p in engine.weights.items()}


UPDATES = {
    "step text": (lambda e: e.copy_weights(copies(e), "x"), "step is 'x'; it must be an integer"),
    "step flag": (lambda e: e.copy_weights(copies(e), True), "step is True; it must be an int"),
    "step -3": (lambda e: e.copy_weights(copies(e), -3), "step is -3; it must be at least 0"),
    "disk 1.5": (lambda e: e.update_weights_from_disk("x", 1.5), "step is 1.5; it must be an int"),
    "disk auto": (lambda e: e.update_weights_from_disk("x", "auto"), "step is 'auto'; it must be"),
    "bind step": (lambda e: e.bind_weights(copies(e), "x"), "step is 'x'; it must be an integer"),
    "bind None": (lambda e: e.bind_weights(None), "params is None; give a mapping of engine names"),
    "copy list": (lambda e: e.copy_weights([1], 2), r"params is \[1\]; give a mapping of engine n"),
    "copy 3": (lambda e: e.copy_weights({"a": 3}, 2), "params has 'a': 3; give names and tensors"),
    "step 2^70": (lambda e: e.copy_weights(copies(e), 1 << 70), "it must be at least 0, and below"),
    "copy sparse": (
        lambda e: e.copy_weights({"a": SPARSE}, 2),
        "a is torch.sparse_coo on cpu; gi",
    ),
    "bind meta": (
        lambda e: e.bind_weights({"a": META}, 2),
        "a is torch.strided on meta; give a",
    ),
    "join port": (lambda e: e.join_weight_transport("h", None, 1, 2), "master_port is None; it mu"),
    "join rank": (lambda e: e.join_weight_transport("h", 9, "1", 2), "rank is '1'; it must be an"),
    "join time": (lambda e: e.join_weight_transport("h", 9, 1, 2, "gloo", "5"), "timeout_s is '5'"),
    "group name": (
        lambda e: e.init_weights_update_group("h", 9, 1, 2, group_name=[1]),
        r"group_name is \[1\]; it must be a text",
    ),
    "name": (lambda e: e.get_weights_by_name(3), "names has 3; give Hugging Face names"),
    "port": (lambda e: e.init_weights_update_group("h", "9", 1, 2), "master_port is '9'; it must"),
    "offset": (lambda e: e.init_weights_update_group("h", 9, 2, 2), "rank_offset is 2 for 1 ranks"),
    "trainer": (lambda e: e.init_weights_update_group("h", 9, 0, 2), "it must be at least 1, beh"),
    "world": (lambda e: e.init_weights_update_group("h", 9, 1, "2"), "world_size is '2'; it must"),
}


@pytest.mark.parametrize("call", UPDATES)
def test_bad_arguments_of_updates(updated, truth, call):
    """They are refused before anything changes."""
    make, why = UPDATES[call]
    with pytest.raises(ValueError, match=why):
        make(updated)
    assert outcomes(updated.generate(PROMPTS, PARAMS)) == truth


GROUPS = {
    "address": ({"address": ""}, "the address is ''; it must be a host's name or number"),
    "url": ({"address": "tcp://127.0.0.1"}, "the address is 'tcp://127.0.0.1'; it must be a host"),
    "port 0": ({"port": 0}, r"the port is 0; it must be in \[1, 65535\]"),
    "port": ({"port": 99999}, "the port is 99999; it must be in"),
    "time": ({"timeout_s": 0}, "timeout_s is 0.0; it must be positive, and bel"),
    "for ever": ({"timeout_s": math.inf}, "timeout_s is inf; it must be positive, and be"),
    "time text": ({"timeout_s": "5 s"}, "timeout_s is '5 s'; it must be a number"),
    "backend": ({"backend": "mpi"}, "backend 'mpi' is unknown; use one of nccl, gloo"),
}


@pytest.mark.parametrize("case", GROUPS)
def test_places_of_update_groups(updated, case):
    """What cannot be is refused without a connection."""
    changes, why = GROUPS[case]
    place = {"address": "127.0.0.1", "port": 9, "timeout_s": 5.0, "backend": "gloo"} | changes
    address, port = place.pop("address"), place.pop("port")
    with pytest.raises(ValueError, match=why):
        updated.init_weights_update_group(address, port, 1, 2, **place)


def test_steps_of_an_engine(qwen3_path, updated):
    """One that reads a folder has the folder's; one that is given weights is told theirs."""
    with pytest.raises(ValueError, match="step is 7 without weights; a folder has its own"):
        Engine(qwen3_path, device="cpu", step=7)
    with pytest.raises(ValueError, match="step is 'x'; it must be an integer"):
        Engine(qwen3_path, device="cpu", weights=copies(updated), step="x")


def test_updates_are_for_every_rank(updated, qwen3_path, truth):
    """While rank 0 leads others, who would not hear of it."""
    updated.loop.book.lockstep.leads = True
    params = copies(updated)
    calls = (
        lambda: updated.bind_weights(params, 3),
        lambda: updated.copy_weights(params, 3),
        lambda: updated.update_weights_from_disk(qwen3_path, 3),
        updated.begin_weight_update,
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="is for every rank: call it after the block Engine"):
            call()
    updated.loop.book.lockstep.leads = False
    assert outcomes(updated.generate(PROMPTS, PARAMS)) == truth


@pytest.mark.parametrize("method", ["copy_weights", "update_weights_from_disk"])
def test_an_interrupt_as_an_update_begins(updated, truth, qwen3_path, monkeypatch, method):
    """Nothing was written, and nothing is under way."""
    source = qwen3_path if method == "update_weights_from_disk" else copies(updated)
    with monkeypatch.context() as patch:
        patch.setattr(updated.weight_control, "flush_cache", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            getattr(updated, method)(source, 3)
    assert outcomes(updated.generate(PROMPTS, PARAMS)) == truth


def test_a_source_in_the_parameters_own_memory(updated):
    """Another view of the same place is other values."""
    params, name = copies(updated), "decoder.layers.0.mlp.linear_fc2.weight"
    own = updated.weights[name]
    source = params[name] = own[:1].expand_as(own)
    wanted = source.clone()
    updated.copy_weights(params, 3)
    assert torch.equal(updated.weights[name], wanted)


def test_nan_in_an_update(updated):
    params = copies(updated)
    params["decoder.layers.2.mlp.linear_fc2.weight"][1, 1] = math.nan
    why = "NaN or Inf in 1 tensors: decoder.layers.2.mlp.linear_fc2.weight"
    with pytest.raises(WeightSyncError, match=f"update to step 7 refused: {why}"):
        updated.copy_weights(params, step=7)
    refuses(updated, f"the update to step 7 broke off: {why}")


def test_nan_in_an_update_from_disk(updated, model_copy):
    edit_tensors(model_copy, lambda t: t["model.norm.weight"][:1].fill_(math.nan))
    with pytest.raises(ValueError, match="NaN or Inf in: decoder.final_layernorm.weight"):
        updated.update_weights_from_disk(model_copy, step=3)
    refuses(updated, "step 3 broke off: .*NaN or Inf")


def test_a_missing_tensor_in_an_update(updated):
    params = copies(updated)
    del params["decoder.final_layernorm.weight"]
    with pytest.raises(WeightSyncError, match="never arrived: decoder.final_layernorm.weight"):
        updated.copy_weights(params, step=2)
    refuses(updated, "never arrived")


def test_a_wrong_tensor_in_an_update(updated):
    params = {**copies(updated), "decoder.nonsense.weight": torch.zeros(2)}
    with pytest.raises(WeightSyncError, match="unknown tensor decoder.nonsense.weight"):
        updated.copy_weights(params, step=2)
    refuses(updated, "unknown tensor")
    params = copies(updated)
    params["decoder.final_layernorm.weight"] = torch.zeros(49)
    with pytest.raises(WeightSyncError, match=r"is \(48,\) torch.float32 here and \(49,\)"):
        updated.copy_weights(params, step=3)
    refuses(updated, r"step 3 broke off: .*\(49,\)")


def test_a_wrong_digest(updated):
    with pytest.raises(WeightSyncError, match="digest [0-9a-f]{16} here, 0123456789abcdef at"):
        updated.copy_weights(copies(updated), step=2, digest="0123456789abcdef")
    refuses(updated, "digest")


def test_an_update_that_broke_off(updated):
    updated.sink.begin(4)
    refuses(updated, "an update to step 4 is under way")
    with pytest.raises(WeightSyncError, match="step 5 begun during that to step 4"):
        updated.sink.begin(5)
    updated.sink.abort("the trainer died")
    refuses(updated, "the update to step 4 broke off: the trainer died")


def test_folders_that_do_not_fit_an_update(updated, model_copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        updated.update_weights_from_disk(tmp_path / "nothing")
    edit_tensors(model_copy, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="missing: model.norm.weight"):
        updated.update_weights_from_disk(model_copy)


def test_updates_need_an_idle_engine(updated):
    """Weights may not change under a running sample; the refusal harms neither."""
    request = updated.add_request(PROMPTS[0], PARAMS)
    updated.step()
    for call in (
        lambda: updated.copy_weights(copies(updated), step=1),
        lambda: updated.sink.begin(1),
        lambda: updated.bind_weights(copies(updated)),
    ):
        with pytest.raises(WeightSyncError, match="needs an idle engine: 1 requests are unfin"):
            call()
    updated.step()
    assert [len(c.token_ids) for c in updated.abort_request(request)] == [2, 2]


def test_bound_weights_must_fit(updated):
    params = copies(updated)
    del params["decoder.final_layernorm.weight"]
    with pytest.raises(ValueError, match="do not fit the engine: decoder.final_layernorm.weight"):
        updated.bind_weights(params)
    with pytest.raises(WeightSyncError, match="no weight group"):
        updated.receive_weight_update()


def test_nan_that_appears_while_running(updated):
    """Weights damaged in memory: detected at the first token, nothing is left behind."""
    weight = updated.weights["decoder.layers.1.mlp.linear_fc2.weight"]
    weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN log-prob in request .*, sample 0, at position 5"):
        updated.generate(PROMPTS, PARAMS)
    with pytest.raises(NonFiniteError, match="NaN log-prob in request .*, sample 0, at position 1"):
        updated.score(PROMPTS)
    assert not updated.has_unfinished_requests
    assert updated.pool.num_free == updated.pool.num_pages
