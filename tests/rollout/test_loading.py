"""What is read of a model folder, and engines that are made on weights of others or on none."""

import math

import pytest
import torch
from helpers import make_prompts, outcomes, recorded_reads

from samebit.recipes.models.tiny_model import make_random_model
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_safetensors
from samebit.rollout.types import SamplingParams
from samebit.trainer.megatron.stages import make_stage, stage_specs
from samebit.weight_sync.types import WeightSyncError, WeightVersion

PROMPTS = make_prompts(20, 5)
PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)
NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    """Biases, four layers, and a vocabulary that is padded."""
    path = tmp_path_factory.mktemp("loading") / "model"
    make_random_model(path, "qwen2", seed=2, tied=request.param, num_layers=4)
    return path


@pytest.mark.parametrize(("size", "stages"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_ranks_and_stages_read_what_they_hold(folder, monkeypatch, size, stages):
    """A large model of eight ranks would be read eight times, and its columns pinned whole."""
    reads, model = recorded_reads(monkeypatch), load_model_config(folder)
    whole, total, replicated = model.param_specs(), 0, 0
    for rank in range(size):
        for index in range(stages):
            specs = stage_specs(model, (rank, size), make_stage(model, index, stages, 1))
            params = {spec.name: torch.empty(spec.shape) for spec in specs}
            reads.clear()
            load_safetensors(folder, specs, params, whole)
            held = {s.name: num_bytes(s) for s in specs}
            assert sum(n for _, n in reads) == sum(held.values())
            total += sum(held.values())
            replicated += sum(held[s.name] for s in specs if s.replica)
    assert total - replicated == sum(map(num_bytes, whole))


def num_bytes(spec):
    """Of what a shard holds of the folder: without padding, in fp32."""
    return 4 * sum(block.num_rows for block in spec.blocks) * math.prod(spec.shape[1:])


def test_an_engine_on_given_weights_reads_none(folder, monkeypatch):
    """They are served from their memory, by the step that made them, with the same tokens."""
    loaded = Engine(folder)
    reads = recorded_reads(monkeypatch)
    given = {name: p.clone() for name, p in loaded.weights.items()}
    engine = Engine(folder, weights=given, step=7)
    assert not reads
    assert engine.weight_version == WeightVersion(7, loaded.weight_version.digest)
    assert all(p.data_ptr() == given[name].data_ptr() for name, p in engine.weights.items())
    found, expected = (e.generate(PROMPTS, PARAMS) for e in (engine, loaded))
    assert outcomes(found) == outcomes(expected)
    engine.sink.begin(8)
    engine.sink.receive_in_place(given)
    assert engine.sink.commit(engine.digest()).step == 8


@pytest.mark.parametrize("damage", ["nan", "dtype", "missing"])
def test_given_weights_that_do_not_fit_are_refused(folder, damage):
    """As by bind_weights, before anything else is made."""
    given = dict(Engine(folder).weights)
    if damage == "missing":
        del given[NORM]
    else:
        given[NORM] = given[NORM].double() if damage == "dtype" else given[NORM] * torch.nan
    with pytest.raises(ValueError, match=NORM):
        Engine(folder, weights=given)


def test_nothing_is_served_before_the_first_update(folder, monkeypatch):
    """load_format=none: whatever the memory held must not become tokens."""
    loaded = Engine(folder)
    reads = recorded_reads(monkeypatch)
    engine = Engine(folder, load_format="none")
    for ask in (lambda: engine.generate(PROMPTS, PARAMS), lambda: engine.score(PROMPTS)):
        with pytest.raises(WeightSyncError, match="no weights were loaded yet"):
            ask()
    assert not reads
    engine.copy_weights(loaded.weights, step=0)
    assert engine.weight_version == loaded.weight_version
    found, expected = (e.generate(PROMPTS, PARAMS) for e in (engine, loaded))
    assert outcomes(found) == outcomes(expected)
    other = Engine(folder, load_format="none")
    assert other.update_weights_from_disk(folder, step=3) == WeightVersion(3, loaded.digest())
