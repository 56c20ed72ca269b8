"""Which weights an engine serves after a binding, an update, and one that was refused."""

import json

import pytest
import torch
from helpers import assert_same_bits, edit_config, edit_tensors, make_prompts, outcomes

from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.transports.alias import AliasLease
from samebit.weight_sync.types import VersionSpan, WeightSyncError, WeightVersion

PROMPTS = make_prompts(40, 5)
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)
NORM = "decoder.final_layernorm.weight"


def scaled(engine, factor):
    """A full set of other weights."""
    return {name: p * factor for name, p in engine.weights.items()}


def served(engine):
    """What an engine makes of the prompts, and by which version."""
    groups = engine.generate(PROMPTS, PARAMS)
    assert [c.version_spans for [c] in groups] == [(VersionSpan(0, engine.weight_version),)] * 2
    return outcomes(groups), engine.score(PROMPTS)


@pytest.fixture(scope="module")
def truth(make_engine):
    """By factor: what a fresh engine serves."""
    found = {}
    for factor in (1.0, 1.5):
        engine = make_engine(prefix_cache=False)
        engine.copy_weights(scaled(engine, factor), step=1)
        found[factor] = served(engine)
    return found


def test_bound_weights_are_served_at_once(make_engine, truth):
    """Old prefixes are not found again; the memory is the trainer's, and updates go on in it."""
    engine = make_engine(page_size=16)
    memory = scaled(engine, 1.5)
    assert served(engine) == served(engine) == truth[1.0]
    assert engine.prefixes.num_hit_tokens > 0
    version = engine.bind_weights(memory, step=4)
    assert version == engine.weight_version == WeightVersion(4, engine.digest())
    assert served(engine) == truth[1.5]
    assert_same_bits(engine.get_weights_by_name(NORM), memory[NORM])
    lease = AliasLease(engine.sink)
    lease.lease(5)
    for p in memory.values():
        p.div_(1.5)
    fresh = make_engine()
    fresh.bind_weights({name: p.clone() for name, p in memory.items()})
    assert lease.update(memory, fresh.weight_version.digest).step == 5
    assert served(engine) == served(fresh) != truth[1.5]


def test_a_part_of_the_parameters_is_no_update(make_engine, truth):
    """Whoever shares all but one would have that one trained and not served."""
    engine = make_engine()
    memory = scaled(engine, 1.5)
    engine.bind_weights(memory)
    lease = AliasLease(engine.sink)
    lease.lease(1)
    part = {name: p for name, p in memory.items() if name != NORM}
    with pytest.raises(WeightSyncError, match=f"not shared with the engine: {NORM}$"):
        lease.update(part, engine.digest())
    with pytest.raises(WeightSyncError, match="step 1 broke off"):
        served(engine)
    lease.lease(2)
    lease.update(memory, engine.digest())
    assert served(engine) == truth[1.5]


@pytest.mark.parametrize("damage", ["nan", "inf", "dtype", "shape", "missing"])
def test_a_refused_binding_changes_nothing(make_engine, truth, damage):
    engine = make_engine()
    version, memory = engine.weight_version, scaled(engine, 1.5)
    if damage in ("nan", "inf"):
        memory[NORM][3] = float(damage)
    elif damage == "dtype":
        memory[NORM] = memory[NORM].double()
    elif damage == "shape":
        memory[NORM] = memory[NORM][:-1]
    else:
        del memory[NORM]
    with pytest.raises(ValueError, match=NORM):
        engine.bind_weights(memory, step=3)
    assert engine.weight_version == version
    assert served(engine) == truth[1.0]


def test_a_binding_mends_an_engine_whose_update_broke_off(make_engine, truth):
    engine = make_engine()
    engine.sink.begin(2)
    engine.sink.abort("the trainer died")
    engine.bind_weights(scaled(engine, 1.5), step=3)
    assert served(engine) == truth[1.5]


def test_the_step_of_an_update_from_disk(make_engine, qwen3_path, model_copy):
    """What is asked for, else the folder's own, else the next."""
    engine = make_engine()
    digest = engine.weight_version.digest
    assert engine.update_weights_from_disk(qwen3_path) == WeightVersion(1, digest)
    assert engine.update_weights_from_disk(qwen3_path, step=7) == WeightVersion(7, digest)
    assert engine.update_weights_from_disk(qwen3_path) == WeightVersion(8, digest)
    said = model_copy / "weight_version.json"
    said.write_text(json.dumps({"step": 30, "digest": digest}))
    assert engine.update_weights_from_disk(model_copy) == WeightVersion(30, digest)
    assert engine.update_weights_from_disk(model_copy, 5) == WeightVersion(5, digest)
    assert Engine(model_copy).weight_version == WeightVersion(30, digest)


def test_a_folder_that_says_another_digest(make_engine, model_copy, truth):
    """At the start its step means nothing; as an update it is refused, and nothing is served."""
    digest = make_engine().weight_version.digest
    said = model_copy / "weight_version.json"
    said.write_text(json.dumps({"step": 30, "digest": "0" * 16}))
    engine = Engine(model_copy)
    assert engine.weight_version == WeightVersion(0, digest)
    with pytest.raises(WeightSyncError, match=f"digest {digest} here, 0000000000000000 at"):
        engine.update_weights_from_disk(model_copy)
    with pytest.raises(WeightSyncError, match="the update to step 30 broke off"):
        engine.generate(PROMPTS)
    said.unlink()
    engine.update_weights_from_disk(model_copy)
    assert served(engine) == truth[1.0]


def test_a_digest_of_another_dtype_says_nothing(make_engine, model_copy):
    """It is of other bits; the step is the folder's all the same."""
    engine = make_engine()

    def narrow(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    edit_tensors(model_copy, narrow)
    version = json.dumps({"step": 30, "digest": "0" * 16})
    (model_copy / "weight_version.json").write_text(version)
    found = engine.update_weights_from_disk(model_copy)
    assert found == WeightVersion(30, engine.digest()) == engine.weight_version


def test_context_and_end_tokens_stay_the_engines_own(make_engine, model_copy, truth):
    """A folder that says others is one of the same model."""
    engine = make_engine()
    edit_config(model_copy, max_position_embeddings=2048, eos_token_id=[1, 2, 3])
    engine.update_weights_from_disk(model_copy)
    assert (engine.max_model_len, engine.model_config.eos_token_ids) == (1024, (0,))
    assert served(engine) == truth[1.0]


def test_a_folder_of_another_model_changes_nothing(make_engine, tmp_path, truth):
    """Neither weights nor version, nor the readiness to serve."""
    from samebit.recipes.models.tiny_model import make_random_model

    engine = make_engine()
    version = engine.weight_version
    make_random_model(tmp_path / "other", "qwen3", seed=1, tied=False, num_layers=2)
    with pytest.raises(ValueError, match="num_layers is 2, the engine's 3"):
        engine.update_weights_from_disk(tmp_path / "other")
    assert engine.weight_version == version
    assert served(engine) == truth[1.0]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_update_whose_source_breaks_leaves_no_mixture(make_engine, truth, error):
    """It was in the midst of the update: the engine says so until it is whole again."""
    engine = make_engine()
    good = scaled(engine, 1.0)

    class Torn(dict):
        def __getitem__(self, name):
            if name == NORM:
                raise error("the cable was pulled")
            return super().__getitem__(name)

    with pytest.raises(error, match="the cable was pulled"):
        engine.copy_weights(Torn(scaled(engine, 2.0)), step=6)
    with pytest.raises(WeightSyncError, match="step 6 broke off: the cable was pulled"):
        served(engine)
    engine.copy_weights(good, step=7)
    assert served(engine) == truth[1.0]
    assert torch.equal(engine.weights[NORM], good[NORM])
