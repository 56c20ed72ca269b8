"""Updates as RL frameworks make them, against SGLang's method signatures, over gloo."""

import inspect
from functools import partial

import pytest
import torch
from helpers import outcomes
from safetensors.torch import load_file
from serving import PARAMS, PROMPTS, local_engine, served, serves
from update_trainer import GROUP, Trainer, full_update, parts

from samebit.rollout.engine import Engine
from samebit.rollout.remote import RemoteEngine
from samebit.weight_sync.meeting import host_store, loopback_listener
from samebit.weight_sync.types import WeightSyncError, WeightVersion

NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def remote(remote_of_any_size):
    return remote_of_any_size


@pytest.fixture
def trainer(forkserver, new):
    trainer = Trainer(forkserver, new.folder)
    yield trainer
    trainer.close()


@pytest.fixture
def engine(old):
    engine = local_engine(old.folder)
    yield engine
    for name in list(engine._update_groups):
        engine.destroy_weights_update_group(name)


SIGNATURES = {
    "begin_weight_update": ["selector"],
    "release_memory_occupation": ["tags"],
    "resume_memory_occupation": ["tags"],
    "end_weight_update": [],
    "init_weights_update_group": [
        "master_address", "master_port", "rank_offset", "world_size", "group_name", "backend"
    ],
    "destroy_weights_update_group": ["group_name"],
    "update_weights_from_distributed": [
        "names", "dtypes", "shapes", "group_name", "flush_cache", "load_format"
    ],
    "update_weights_from_tensor": ["named_tensors", "load_format", "flush_cache"],
    "get_weights_by_name": ["name", "truncate_size"],
    "pause_generation": ["mode"],
    "continue_generation": [],
}  # fmt: skip

KEYWORDS = {
    "update_weights_from_distributed": ["selector", "weight_version"],
    "update_weights_from_tensor": ["selector", "weight_version"],
}
"""What SGLang's requests carry besides; its methods have them in no order."""


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize("kind", [Engine, RemoteEngine])
def test_methods_have_the_arguments_that_frameworks_give(name, kind):
    """In their order; what is ours comes behind them and may be left out."""
    _, *own = inspect.signature(getattr(kind, name)).parameters.values()
    theirs = SIGNATURES[name]
    assert [p.name for p in own[: len(theirs)]] == theirs
    assert all(p.default is not inspect.Parameter.empty for p in own[len(theirs) :])
    assert {p.name for p in own} >= set(KEYWORDS.get(name, []))


def test_a_frameworks_trainer_updates_the_engine(engine, trainer, old, new, expected):
    """Twice, in a group that it made by its own code; the version has the weights' own digest."""
    trainer.join(engine)
    for step in (1, 2):
        assert full_update(engine, trainer) == WeightVersion(step, new.digest)
        assert serves(engine, new, expected)
    assert torch.equal(engine.get_weights_by_name(NORM), trainer.weights[NORM])
    engine.update_weights_from_disk(old.folder)
    assert serves(engine, old, expected)


def test_an_engine_of_another_process_is_updated_alike(remote, trainer, new, expected):
    trainer.join(remote)
    remote.pause_generation()
    assert remote.is_paused
    remote.begin_weight_update("target", 50)
    for names in parts(trainer.weights, 20):
        trainer.update(remote, names)
    assert remote.end_weight_update(new.digest) == WeightVersion(50, new.digest)
    remote.continue_generation()
    assert served(remote) == expected[new.digest]
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(remote.get_weights_by_name(name), trainer.weights[name])
    remote.destroy_weights_update_group(GROUP)


@pytest.mark.parametrize("mode", ["abort", "retract", "keep"])
def test_a_load_that_fails_halfway_answers_no_request(engine, trainer, new, expected, mode):
    """What peers serve then is a mixture; here it is refused, reported, and healed."""
    request = engine.add_request(PROMPTS[0], PARAMS)
    engine.step()
    trainer.join(engine)
    engine.pause_generation(mode)
    engine.begin_weight_update()
    first, second, *_ = parts(trainer.weights, 5)
    trainer.update(engine, first)
    trainer.send(second)
    shapes = [[1, 2, 3] for _ in second]
    with pytest.raises(WeightSyncError, match=f"{second[0]} is .* here and .1, 2, 3. torch.float"):
        engine.update_weights_from_distributed(second, trainer.described(second)[0], shapes)
    assert trainer.said().startswith("failed: ")  # at once: its group is closed
    for call in (
        engine.continue_generation,
        engine.end_weight_update,
        engine.continue_generation,
    ):
        with pytest.raises(WeightSyncError, match=f"{second[0]} is "):
            call()
    assert engine.is_paused
    contents = engine.weight_report()
    assert set(contents.values()) == {"old", "new", "unknown"}
    touched = {spec.name for spec in new.specs for n in first if n in spec.hf_shapes}
    assert {name for name, content in contents.items() if content != "old"} == touched
    trainer.join(engine, "another")
    engine.begin_weight_update()
    names = list(trainer.weights)
    trainer.send(names, group="another")
    engine.update_weights_from_distributed(names, *trainer.described(names), "another")
    assert trainer.said() == "done"
    engine.end_weight_update()
    engine.continue_generation()
    if mode == "abort":
        [[completion, _]] = engine.step()
        assert completion.finish_reason == "abort"
    else:
        while engine.has_unfinished_requests:
            for [completion, _] in engine.step():
                assert completion.request_id == request
                assert [s.version.step for s in completion.version_spans] == [0, 1]
    assert serves(engine, new, expected)


def wrong(trainer, kind):
    """Names, dtypes and shapes, one of which is wrong, and what is said of it."""
    names = [NORM, "lm_head.weight"]
    dtypes, shapes = trainer.described(names)
    if kind == "name":
        return [NORM, "lm_head.weights"], dtypes, shapes, "lm_head.weights; the nearest is lm_head."
    if kind == "shape":
        return names, dtypes, [[48], [48, 331]], r"lm_head.weight is \(331, 48\) torch.float32 here"
    if kind == "dtype":
        return names, ["float32", "torch.bfloat16"], shapes, "and .331, 48. torch.bfloat16 in the"
    return names, dtypes[:1], shapes, "2 names, 1 dtypes and 2 shapes"


@pytest.mark.parametrize("kind", ["name", "shape", "dtype", "number"])
def test_what_does_not_fit_is_refused_before_it_comes(engine, trainer, old, kind):
    """Nothing is sent here at all, and nothing waits; nothing is written either."""
    trainer.join(engine)
    engine.begin_weight_update()
    *described, reason = wrong(trainer, kind)
    with pytest.raises(WeightSyncError, match=f"update to step 1 refused: .*{reason}"):
        engine.update_weights_from_distributed(*described)
    assert set(engine.weight_report().values()) == {"old"}
    assert all(torch.equal(p, old.params[n]) for n, p in engine.weights.items())
    with pytest.raises(ValueError, match=f"no weight group '{GROUP}'.*none.; call init_weights"):
        engine.destroy_weights_update_group()


def test_nobody_is_there(engine):
    """No trainer listens, or under another name: one line that says where and who was awaited."""
    with loopback_listener() as listener:
        place = listener.getsockname()
    join = partial(engine.init_weights_update_group, *place, 1, 2, backend="gloo", timeout_s=1.0)
    with pytest.raises(WeightSyncError, match=f"no weight group at {place[0]}:{place[1]}: .*"):
        join()
    store = host_store(loopback_listener(), 2)
    place = place[0], store.port
    join = partial(engine.init_weights_update_group, *place, 1, 2, backend="gloo", timeout_s=3.0)
    with pytest.raises(WeightSyncError, match="no weight group 'x' of 2 ranks at .*: [^\n]*$"):
        join(group_name="x")


TIED = "model.embed_tokens.weight"


@pytest.mark.parametrize("order", [(TIED, HEAD), (HEAD, TIED), (HEAD,)])
def test_a_tied_head_may_come_too(llama_path, order):
    """As trainers send it that have both; it has to be the embedding."""
    engine, weights = local_engine(llama_path), load_file(llama_path / "model.safetensors")
    rest = [(name, tensor) for name, tensor in weights.items() if name not in (TIED, HEAD)]
    both = dict.fromkeys(order, weights[TIED] * 1.5)
    engine.begin_weight_update()
    engine.update_weights_from_tensor([*rest, *both.items()])
    engine.end_weight_update()
    assert torch.equal(engine.get_weights_by_name(TIED), weights[TIED] * 1.5)
    assert torch.equal(engine.get_weights_by_name(HEAD), weights[TIED] * 1.5)
    engine.begin_weight_update()
    other = {TIED: weights[TIED], HEAD: weights[TIED] * 2}
    with pytest.raises(WeightSyncError, match=f"{HEAD} is not {TIED}, and this model ties them"):
        engine.update_weights_from_tensor([*rest, *other.items()])


def named(weights, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return list({**weights, **changes}.items())


FAULTS = {
    "missing": (lambda w: [(n, t) for n, t in w.items() if n != NORM], "1 tensors never arrived"),
    "extra": (lambda w: named(w, x=torch.zeros(1)), "unknown tensor x"),
    "NaN": (lambda w: named(w, model__norm__weight=torch.full((48,), torch.nan)), "NaN or Inf"),
    "dtype": (lambda w: named(w, model__norm__weight=torch.ones(48).half()), "torch.float16 in"),
    "twice": (lambda w: [*w.items(), (NORM, w[NORM])], "final_layernorm.weight arrived twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_tensors_end_the_session(engine, new, expected, fault):
    """Of each kind, given in this process; a second session heals it."""
    weights = load_file(new.folder / "model.safetensors")
    make, reason = FAULTS[fault]
    engine.begin_weight_update()
    with pytest.raises(WeightSyncError, match=reason):  # noqa: PT012 - at one of two places
        engine.update_weights_from_tensor(make(weights))
        engine.end_weight_update()
    with pytest.raises(WeightSyncError, match=f"broke off: .*{reason}"):
        engine.generate(PROMPTS, PARAMS)
    engine.begin_weight_update()
    for names in parts(weights):
        engine.update_weights_from_tensor([(name, weights[name]) for name in names])
    with pytest.raises(WeightSyncError, match=f"digest {new.digest} here, 00 at the sender"):
        engine.end_weight_update(digest="00")
    engine.begin_weight_update()
    engine.update_weights_from_tensor(weights.items())
    assert engine.end_weight_update(new.digest).step == 1
    assert serves(engine, new, expected)


def test_a_session_is_needed_and_there_is_one(engine, new):
    """As SGLang has it: no update outside a session, and no second one in it."""
    tensor = [(NORM, torch.ones(48))]
    with pytest.raises(WeightSyncError, match=r"state: ready\); call begin_weight_update first"):
        engine.update_weights_from_tensor(tensor)
    with pytest.raises(WeightSyncError, match=r"state: ready\); call begin_weight_update first"):
        engine.update_weights_from_distributed([NORM], ["float32"], [[48]])
    with pytest.raises(WeightSyncError, match="no update is under way"):
        engine.end_weight_update()
    engine.copy_weights(new.params, 5)
    with pytest.raises(WeightSyncError, match="step 4 is stale"):
        engine.begin_weight_update(step=4)
    with pytest.raises(WeightSyncError, match="no draft model is served"):
        engine.begin_weight_update("draft")
    engine.begin_weight_update()
    with pytest.raises(WeightSyncError, match="step 6 begun during that to step 6"):
        engine.begin_weight_update()
    with pytest.raises(ValueError, match="load_format 'direct' is unknown; use one of None, 'flat"):
        engine.update_weights_from_tensor(tensor, load_format="direct")
    with pytest.raises(WeightSyncError, match="an update to step 6 is under way"):
        engine.generate(PROMPTS, PARAMS)


def test_a_trainer_that_never_answers_is_given_up(engine, trainer):
    """After timeout_s, in which nothing hangs for good; and one that dies, at once."""
    for name, end in (("silent", lambda: None), ("dead", trainer.die)):
        trainer.join(engine, name, timeout_s=1.0 if name == "silent" else 30.0)
        engine.begin_weight_update()
        end()
        with pytest.raises(WeightSyncError, match="the weight group lost a member"):
            engine.update_weights_from_distributed([NORM], ["float32"], [[48]], name)
        with pytest.raises(WeightSyncError, match="the weight group lost a member"):
            engine.end_weight_update()
        with pytest.raises(WeightSyncError, match="0 tensors are new, 1 unknown"):
            engine.generate(PROMPTS, PARAMS)


def test_a_group_says_what_is_wrong_with_it(engine, monkeypatch):
    """Before anybody is waited for."""
    monkeypatch.delenv("SAMEBIT_SECRET", raising=False)
    join = engine.init_weights_update_group
    with pytest.raises(ValueError, match="backend 'nccl' needs a GPU; .* use 'gloo'"):
        join("127.0.0.1", 1, 1, 2)
    with pytest.raises(ValueError, match="backend 'mpi' is unknown; use one of nccl, gloo"):
        join("127.0.0.1", 1, 1, 2, backend="mpi")
    with pytest.raises(ValueError, match="meets at 192.0.2.1, and SAMEBIT_SECRET is not set"):
        join("192.0.2.1", 1, 1, 2, backend="gloo")


def test_a_second_group_of_a_name_is_refused(engine, trainer):
    trainer.join(engine)
    with pytest.raises(ValueError, match=f"group '{GROUP}' is there; destroy_weights_update_group"):
        engine.init_weights_update_group("127.0.0.1", 1, 1, 2, backend="gloo")


def test_weights_are_given_by_either_name(engine, old):
    """A whole tensor by its Hugging Face name, put together from interleaved rows."""
    weights = load_file(old.folder / "model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(engine.get_weights_by_name(name), tensor), name
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(engine.get_weights_by_name(name, truncate_size=3), weights[name][:3])
    engine.get_weights_by_name(name).zero_()
    assert torch.equal(engine.get_weights_by_name(name), weights[name])
    with pytest.raises(KeyError, match="no weight model.norm.weights; the nearest is model.norm.w"):
        engine.get_weights_by_name("model.norm.weights")
    assert outcomes(engine.generate(PROMPTS, PARAMS))
