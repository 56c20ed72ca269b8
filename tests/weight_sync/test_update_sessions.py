"""Sessions of begin_weight_update: whose they are, and what becomes of those of a dead trainer."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from serving import PARAMS, PROMPTS, local_engine, serves
from update_trainer import GROUP, Trainer, full_update, parts

from samebit.weight_sync.types import WeightSyncError, WeightVersion

NORM = "model.norm.weight"
OTHER = "other"


@pytest.fixture
def start(forkserver, new):
    """Starts trainers, which end with the test."""
    started = []

    def make():
        started.append(Trainer(forkserver, new.folder))
        return started[-1]

    yield make
    for trainer in started:
        trainer.close()


@pytest.fixture
def engine(old):
    engine = local_engine(old.folder)
    yield engine
    engine.close()


@pytest.fixture
def weights(new):
    return load_file(new.folder / "model.safetensors")


NUM_PARTS = 6
POINTS = [(n, within) for n in range(NUM_PARTS + 1) for within in (False, True)][:-1]
QUICK = [(0, False), (2, True), (3, False), (NUM_PARTS, False)]


def die_at(point, trainer, engine):
    """Begin an update, of which the trainer's process is killed behind so many calls, or within
    the next; the names that it had sent."""
    num_parts, is_within = point
    names = parts(trainer.weights, -(-len(trainer.weights) // NUM_PARTS))
    assert len(names) == NUM_PARTS
    engine.begin_weight_update()
    for part in names[:num_parts]:
        trainer.update(engine, part)
    sent = [name for part in names[:num_parts] for name in part]
    if not is_within:
        trainer.die()
        return sent
    trainer.send(names[num_parts][:1])
    trainer.doom()
    with pytest.raises(WeightSyncError, match="the weight group lost a member"):
        engine.update_weights_from_distributed(
            names[num_parts], *trainer.described(names[num_parts])
        )
    return sent


@pytest.mark.parametrize(
    "point", [p if p in QUICK else pytest.param(p, marks=pytest.mark.long) for p in POINTS]
)
def test_a_trainer_that_is_killed_at_any_point_leaves_it_dirty(start, engine, new, expected, point):
    """It refuses and reports; a trainer that starts anew, and calls what it always does, heals."""
    trainer = start()
    trainer.join(engine)
    sent = die_at(point, trainer, engine)
    with pytest.raises(WeightSyncError, match="the update to step 1 broke off: the (trainer|weig)"):
        engine.generate(PROMPTS, PARAMS)
    report = engine.weight_report()
    touched = {spec.name for spec in new.specs for name in sent if name in spec.hf_shapes}
    assert touched <= {name for name, content in report.items() if content != "old"}
    assert ("old" in report.values()) == (len(sent) < len(trainer.weights))
    again = start()
    again.join(engine)
    assert full_update(engine, again) == WeightVersion(1, new.digest)
    assert serves(engine, new, expected)


def joined_anew(engine, start):
    trainer = start()
    engine.destroy_weights_update_group()
    trainer.join(engine)
    full_update(engine, trainer)


HEALS = {
    "another name": lambda engine, start, new: anew(engine, start(), OTHER),
    "left first": lambda engine, start, new: joined_anew(engine, start),
    "copied": lambda engine, start, new: engine.copy_weights(new.params, 1, new.digest),
    "a folder": lambda engine, start, new: engine.update_weights_from_disk(new.folder),
    "released": lambda engine, start, new: released(engine, new),
    "bound": lambda engine, start, new: engine.bind_weights(new.params, 1),
}


def released(engine, new):
    """As a colocated run would before it trains on."""
    engine.release_memory_occupation(["weights"])
    engine.resume_memory_occupation(["weights"])
    engine.copy_weights(new.params, 1, new.digest)


def anew(engine, trainer, group):
    trainer.join(engine, group)
    engine.begin_weight_update()
    names = list(trainer.weights)
    trainer.send(names, group=group)
    engine.update_weights_from_distributed(names, *trainer.described(names), group)
    engine.end_weight_update()


@pytest.mark.parametrize("how", HEALS)
def test_whatever_updates_next_ends_a_dead_trainers_session(start, engine, new, expected, how):
    trainer = start()
    trainer.join(engine)
    die_at((1, False), trainer, engine)
    HEALS[how](engine, start, new)
    assert serves(engine, new, expected)


def test_a_session_is_aborted(engine, weights, new, expected):
    """Which nobody's death ends: it came from this process."""
    assert not engine.abort_weight_update()
    for changes in ([], [(NORM, weights[NORM])]):
        engine.begin_weight_update()
        engine.update_weights_from_tensor(changes)
        assert engine.abort_weight_update("the trainer was started again")
        with pytest.raises(WeightSyncError, match="broke off: the trainer was started again"):
            engine.generate(PROMPTS, PARAMS)
        with pytest.raises(WeightSyncError, match=r"no update is under way \(state: dirty\)"):
            engine.end_weight_update()
    engine.begin_weight_update()
    engine.update_weights_from_tensor(weights.items())
    assert engine.end_weight_update(new.digest).step == 1
    assert not engine.abort_weight_update()
    assert serves(engine, new, expected)


def test_an_engine_of_another_process_is_aborted(remote, old, expected):
    remote.begin_weight_update()
    assert remote.abort_weight_update()
    with pytest.raises(WeightSyncError, match="broke off: abort_weight_update was called"):
        remote.generate(PROMPTS, PARAMS)
    remote.update_weights_from_disk(old.folder)
    assert serves(remote, old, expected)


def test_a_living_trainers_session_is_its_own(start, engine, old, new, expected):
    """Another can neither begin, fill nor end up in it; it goes on as if nobody had tried."""
    mine, other = start(), start()
    mine.join(engine)
    other.join(engine, OTHER)
    first, *rest = parts(mine.weights, 12)
    engine.begin_weight_update()
    mine.update(engine, first)
    tensor = [(NORM, torch.ones(48))]
    with pytest.raises(WeightSyncError, match="step 1 begun during that to step 1"):
        engine.begin_weight_update()
    with pytest.raises(WeightSyncError, match=f"by the group '{GROUP}', and these from this proc"):
        engine.update_weights_from_tensor(tensor)
    with pytest.raises(WeightSyncError, match=f"by the group '{GROUP}', and these by the group 'o"):
        engine.update_weights_from_distributed([NORM], ["float32"], [[48]], OTHER)
    with pytest.raises(WeightSyncError, match="step 3 begun during that to step 1"):
        engine.copy_weights(old.params, 3)
    for names in rest:
        mine.update(engine, names)
    assert engine.end_weight_update() == WeightVersion(1, new.digest)
    assert serves(engine, new, expected)
    engine.begin_weight_update()
    engine.update_weights_from_tensor(tensor)
    with pytest.raises(WeightSyncError, match="from this process, and these by the group 'weight_"):
        engine.update_weights_from_distributed([NORM], ["float32"], [[48]])


def test_a_session_by_several_groups(start, engine, new, expected):
    """Of a trainer's pipeline stages, which are named at the start; all of them have to live."""
    first, second, third = start(), start(), start()
    for trainer, name in ((first, "pp_0"), (second, "pp_1"), (third, OTHER)):
        trainer.join(engine, name)
    with pytest.raises(ValueError, match="no weight group 'pp_2'"):
        engine.begin_weight_update(group_names=["pp_0", "pp_2"])
    engine.begin_weight_update(group_names=["pp_0", "pp_1"])
    halves = parts(first.weights, -(-len(first.weights) // 2))
    with pytest.raises(WeightSyncError, match="by the group 'pp_0' or 'pp_1', and these by the gr"):
        engine.update_weights_from_distributed([NORM], ["float32"], [[48]], OTHER)
    for trainer, name, names in zip((first, second), ("pp_0", "pp_1"), halves, strict=True):
        trainer.send(names, group=name)
        engine.update_weights_from_distributed(names, *trainer.described(names), name)
    assert engine.end_weight_update() == WeightVersion(1, new.digest)
    engine.begin_weight_update(group_names=["pp_0", "pp_1"])
    second.die()
    with pytest.raises(WeightSyncError, match="broke off: the trainer that sent it is gone"):
        engine.generate(PROMPTS, PARAMS)


def test_calls_that_give_a_sessions_number(engine, weights, new, expected):
    """Those of others in this process are refused, and so is what gives none."""
    number = engine.begin_weight_update()
    first, second = parts(weights.items(), -(-len(weights) // 2))
    engine.update_weights_from_tensor(first, session=number)
    for other, why in (
        (number - 1, f"session {number - 1} is not open"),
        (None, "does not: it is"),
    ):
        with pytest.raises(WeightSyncError, match=why):
            engine.update_weights_from_tensor(second, session=other)
        with pytest.raises(WeightSyncError, match=why):
            engine.end_weight_update(session=other)
    with pytest.raises(WeightSyncError, match=f"session {number + 1} is not open"):
        engine.abort_weight_update(session=number + 1)
    engine.update_weights_from_tensor(second, session=number)
    assert engine.end_weight_update(session=number) == WeightVersion(1, new.digest)
    assert serves(engine, new, expected)


def test_a_transports_update_is_not_a_session(engine, weights, old, new, expected):
    """What begin_weight_update has not begun takes no tensor of a framework's, and no end."""
    engine.sink.begin(4)
    calls = (
        engine.end_weight_update,
        lambda: engine.update_weights_from_tensor([(NORM, weights[NORM])]),
        lambda: engine.update_weights_from_distributed([NORM], ["float32"], [[48]]),
    )
    for call in calls:
        with pytest.raises(WeightSyncError, match="has begun, but one of a transport"):
            call()
    assert not engine.abort_weight_update()
    assert set(engine.weight_report().values()) == {"old"}
    engine.sink.abort("no more")
    engine.copy_weights(new.params, 5, new.digest)
    assert serves(engine, new, expected)


def test_a_selector_is_that_of_the_session(engine):
    engine.begin_weight_update("target")
    with pytest.raises(ValueError, match="selector is 'draft', and the session .* of 'target'"):
        engine.update_weights_from_tensor([], selector="draft")
    with pytest.raises(ValueError, match="selector 'both' is unknown; use one of all, target, dra"):
        engine.update_weights_from_tensor([], selector="both")
    engine.abort_weight_update()
    engine.begin_weight_update()
    with pytest.raises(WeightSyncError, match="selector 'draft': no draft model is served"):
        engine.update_weights_from_tensor([], selector="draft")


def test_weight_version_is_the_step(engine, weights, new):
    """As SGLang's requests carry it; what contradicts is refused, and the update goes on."""
    tensors = list(weights.items())
    engine.begin_weight_update()
    engine.update_weights_from_tensor(tensors[:1], weight_version="7")
    with pytest.raises(ValueError, match="weight_version is 8, and the session of .* step 7"):
        engine.update_weights_from_tensor(tensors[1:], weight_version=8)
    for bad in ("default", "-1", 1.5, True):
        with pytest.raises(ValueError, match=f"weight_version is '?{bad}'?; it must be the step"):
            engine.update_weights_from_tensor(tensors[1:], weight_version=bad)
    engine.update_weights_from_tensor(tensors[1:], weight_version="7")
    assert engine.end_weight_update() == WeightVersion(7, new.digest)
    engine.begin_weight_update(step=9)
    with pytest.raises(ValueError, match="weight_version is 10, and the session of .* step 9"):
        engine.update_weights_from_tensor(tensors, weight_version=10)
    engine.abort_weight_update()
    engine.begin_weight_update()
    with pytest.raises(WeightSyncError, match="update to step 6 is stale"):
        engine.update_weights_from_tensor(tensors, weight_version=6)
    engine.update_weights_from_tensor(tensors)
    assert engine.end_weight_update().step == 8


def flattened(named, dtype=torch.uint8):
    """As SGLang's FlattenedTensorBucket has it."""
    flats = [tensor.flatten().view(dtype) for _, tensor in named]
    ends = torch.tensor([len(flat) for flat in flats]).cumsum(0).tolist()
    metadata = [
        SimpleNamespace(
            name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=end - len(f), end_idx=end
        )
        for (name, tensor), f, end in zip(named, flats, ends, strict=True)
    ]
    return {"flattened_tensor": torch.cat(flats), "metadata": metadata}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tensors_in_one_flat_buffer(engine, weights, new, expected, dtype):
    bucket = flattened(list(weights.items()), dtype)
    engine.begin_weight_update()
    engine.update_weights_from_tensor(bucket, load_format="flattened_bucket")
    assert engine.end_weight_update() == WeightVersion(1, new.digest)
    assert serves(engine, new, expected)
    engine.begin_weight_update()
    bucket["metadata"][1].end_idx += 1
    for bad, why in (
        (bucket, "metadata has .* are .* bytes"),
        (b"serialized", "give a mapping of 'flattened_tensor' and 'metadata', not serialized"),
        ({**bucket, "metadata": [3]}, "metadata has 3: .*name"),
    ):
        with pytest.raises(ValueError, match=why):
            engine.update_weights_from_tensor(bad, load_format="flattened_bucket")
    engine.update_weights_from_tensor(weights.items())
    assert engine.end_weight_update() == WeightVersion(2, new.digest)


def test_a_flat_buffer_is_broadcast(start, engine, new, expected):
    """One broadcast for all of a call's tensors."""
    trainer = start()
    trainer.join(engine)
    engine.begin_weight_update()
    for names in parts(trainer.weights, 9):
        flat = flattened([(name, trainer.weights[name]) for name in names])["flattened_tensor"]
        trainer.send(names[:1], {names[0]: flat})
        engine.update_weights_from_distributed(
            names, *trainer.described(names), load_format="flattened_bucket"
        )
        assert trainer.said() == "done"
    assert engine.end_weight_update() == WeightVersion(1, new.digest)
    assert serves(engine, new, expected)


def test_a_refused_call_settles_nothing(start, engine, weights, new):
    """Neither the way that the session's tensors come, nor that its calls give its number."""
    trainer, names = start(), list(weights)
    trainer.join(engine)
    number = engine.begin_weight_update(step=9)
    with pytest.raises(ValueError, match="weight_version is 10"):
        engine.update_weights_from_tensor(
            [(NORM, weights[NORM])], weight_version=10, session=number
        )
    trainer.send(names)
    engine.update_weights_from_distributed(names, *trainer.described(names))
    assert engine.end_weight_update() == WeightVersion(9, new.digest)


def test_a_session_outlives_its_group(start, engine, weights, new, expected):
    """All has come, the group is left, and somebody asks for tokens before the trainer ends it."""
    trainer, names = start(), list(weights)
    trainer.join(engine)
    engine.begin_weight_update()
    trainer.send(names)
    engine.update_weights_from_distributed(names, *trainer.described(names))
    engine.destroy_weights_update_group()
    with pytest.raises(WeightSyncError, match="an update to step 1 is under way"):
        engine.generate(PROMPTS, PARAMS)
    assert engine.end_weight_update() == WeightVersion(1, new.digest)
    assert serves(engine, new, expected)
