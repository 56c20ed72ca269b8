"""Work that is saved (one prefill, cached prefixes), and folders that load the same."""

import gc
import weakref

import pytest
import torch
from helpers import assert_same_bits, make_prompts, outcomes

from samebit.kernels.swiglu import swiglu_linear
from samebit.recipes.models.tiny_model import make_random_model
from samebit.rollout.engine import Engine
from samebit.rollout.models import decoder
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.transports.file import write_hf_folder

VOCAB = 331
PROMPTS = make_prompts(5, 70, 1, 33)
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)


def drawn(engine, **changes):
    """One completion of the first prompt."""
    settings = {"max_new_tokens": 12, "ignore_eos": True, **changes}
    [[completion]] = engine.generate(PROMPTS[:1], SamplingParams(**settings))
    return completion


# -- work saved ------------------------------------------------------------------------------------


@pytest.fixture
def counted(make_engine, monkeypatch):
    """(engine, list that gets the number of tokens of every forward)."""

    def make(**settings):
        engine, sizes = make_engine(**settings), []
        original = engine.runner.forward

        def forward(batch, collect, rows):
            sizes.append(len(batch.input_ids))
            return original(batch, collect, rows)

        monkeypatch.setattr(engine.runner, "forward", forward)
        return engine, sizes

    return make


@pytest.mark.parametrize("cached", [True, False])
def test_one_prefill_for_all_samples_of_a_prompt(counted, cached):
    engine, sizes = counted(prefix_cache=cached)
    engine.generate([PROMPTS[1]], SamplingParams(n=8, max_new_tokens=5, ignore_eos=True))
    assert sizes == [70, 8, 8, 8, 8]


def test_the_last_layer_ends_with_the_rows_that_are_read(make_engine, monkeypatch):
    """Behind the last attention only rows that predict a token go on, unless streams are wanted."""
    rows = []

    def counting(x, weight):
        rows.append(len(x))
        return swiglu_linear(x, weight)

    monkeypatch.setattr(decoder, "swiglu_linear", counting)
    engine = make_engine(prefill_chunk=64, prefix_cache=False)
    layers = engine.model_config.num_layers
    once = SamplingParams(max_new_tokens=1)
    [[plain]] = engine.generate([PROMPTS[1]], once)
    assert rows == [64] * (layers - 1) + [6] * (layers - 1) + [1]
    rows.clear()
    [[streams]] = engine.generate([PROMPTS[1]], once, return_hidden_states=(layers,))
    assert rows == [64] * layers + [6] * layers
    assert (plain.token_ids, plain.logprobs) == (streams.token_ids, streams.logprobs)
    rows.clear()
    engine.score([PROMPTS[1]])
    assert rows == [64] * layers + [5] * layers  # the last token predicts nothing


def test_a_cached_prefix_is_not_computed_again(counted):
    """Full pages are found again; at least one token is left to compute."""
    engine, sizes = counted(page_size=16)
    once = SamplingParams(max_new_tokens=1)
    engine.generate([PROMPTS[1]], once)
    engine.generate([PROMPTS[1]], once)
    assert sizes == [70, 6]
    assert engine.prefixes.num_hit_tokens == 64
    engine.generate([PROMPTS[1][:64]], once)
    assert sizes == [70, 6, 16]
    engine.generate([[*PROMPTS[1][:20], 1, 2, 3]], once)
    assert sizes == [70, 6, 16, 7]
    assert engine.prefixes.num_hit_tokens == 64 + 48 + 16
    engine.flush_cache()
    engine.generate([PROMPTS[1]], once)
    assert sizes[-1] == 70


def test_one_prefill_for_requests_of_one_prompt(counted, make_engine):
    """As for the samples of one request, but for the page that the prompt does not fill."""
    engine, sizes = counted(page_size=16)
    requests = [PROMPTS[1]] * 8
    found = engine.generate(requests, PARAMS)
    assert sum(sizes) == 70 + 7 * 6 + 8 * 11
    assert sizes[0] == 70
    assert engine.prefixes.num_hit_tokens == 7 * 64
    alone = make_engine(prefix_cache=False).generate(requests, PARAMS)
    assert outcomes(found) == outcomes(alone)


def test_completions_are_cached_for_the_next_turn(counted):
    engine, sizes = counted(page_size=16)
    [[first]] = engine.generate([PROMPTS[1]], SamplingParams(max_new_tokens=30, ignore_eos=True))
    sizes.clear()
    engine.generate([[*PROMPTS[1], *first.token_ids, 5]], SamplingParams(max_new_tokens=1))
    assert sizes == [101 - 96]


def test_a_batch_keeps_its_token_budget(counted):
    engine, sizes = counted(max_batch_tokens=37, prefill_chunk=16)
    engine.generate(PROMPTS, PARAMS)
    assert max(sizes) <= 37
    assert sum(sizes) == sum(map(len, PROMPTS)) + 4 * 11


# -- loading ---------------------------------------------------------------------------------------


def test_sharded_folders_load_the_same(qwen3_path, engine, tmp_path):
    """Many small safetensors files with an index, and the folder an export writes."""
    folder = tmp_path / "sharded"
    version = engine.weight_version
    side = [qwen3_path / "config.json"]
    write_hf_folder(folder, engine.specs, engine.weights, version, side, max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    sharded = Engine(folder)
    assert sharded.weight_version == version
    for name, weight in engine.weights.items():
        assert_same_bits(sharded.weights[name], weight, name)
    assert outcomes(sharded.generate(PROMPTS, PARAMS)) == outcomes(engine.generate(PROMPTS, PARAMS))


def test_a_folder_keeps_its_version(engine, qwen3_path, tmp_path):
    version = type(engine.weight_version)(17, engine.weight_version.digest)
    side = [qwen3_path / "config.json"]
    write_hf_folder(tmp_path / "model", engine.specs, engine.weights, version, side)
    assert Engine(tmp_path / "model").weight_version == version


def test_dummy_weights_depend_on_the_seed_alone(qwen3_path, tmp_path):
    """load_format=dummy needs a config.json only."""
    (tmp_path / "config.json").write_text((qwen3_path / "config.json").read_text())
    engines = [Engine(tmp_path, load_format="dummy", seed=s) for s in (3, 3, 4)]
    digests = [e.weight_version.digest for e in engines]
    assert digests[0] == digests[1] != digests[2]
    embedding = engines[0].get_weights_by_name("embedding.word_embeddings.weight")[:VOCAB]
    assert abs(embedding.std().item() - 0.02) < 0.001
    layers = [f"decoder.layers.{i}.mlp.linear_fc2.weight" for i in range(2)]
    assert not torch.equal(*map(engines[0].get_weights_by_name, layers))
    assert drawn(engines[0]).token_ids == drawn(engines[1]).token_ids


def test_tied_and_untied_models_of_both_kinds_run(tmp_path):
    for architecture in ("qwen3", "llama"):
        for tied in (False, True):
            path = tmp_path / f"{architecture}-{tied}"
            make_random_model(path, architecture, seed=1, tied=tied)
            engine = Engine(path)
            assert len(drawn(engine).token_ids) == 12
            assert ("output_layer.weight" in engine.weights) is not tied


def test_weights_by_name_are_copies(make_engine):
    engine = make_engine()
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    engine.get_weights_by_name(name).zero_()
    assert engine.weights[name].any()


def test_read_ahead_reads_every_tensor_once_and_in_order():
    """Threads fetch what the reader would have given; an error reaches the caller."""
    from samebit.rollout.runtime.weights import read_ahead

    names = [str(i) for i in range(30)]
    fetched = []

    def read(name, index):
        assert index == (slice(0, 1),)
        fetched.append(name)
        if name == "23":
            raise OSError("the disk is gone")
        return torch.tensor(int(name))

    parts = [(name, (slice(0, 1),)) for name in names]
    with read_ahead(read, parts, pin=False) as reader:
        assert [int(reader(*part)) for part in parts[:23]] == list(range(23))
        with pytest.raises(OSError, match="the disk is gone"):
            reader(*parts[23])
        assert int(reader(*parts[5])) == 5  # again, out of order
    assert sorted(set(fetched), key=int) == names
    assert len(fetched) == len(names) + 1


def generated_and_dropped(folder, device):
    """Weak references to an engine that has worked and that nobody holds any more, and to what
    holds its memory."""
    engine = Engine(folder, device=device)
    engine.generate(PROMPTS, PARAMS)
    owners = (engine, engine.arena, engine.runner.cache, engine.runner.model, engine.sink)
    return [weakref.ref(owner) for owner in owners]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_dropped_engine_frees_its_memory_at_once(qwen3_path, device):
    """Gigabytes must not wait for the garbage collector: no reference cycles."""
    gc.collect()
    gc.disable()
    try:
        assert [ref() for ref in generated_and_dropped(qwen3_path, device)] == [None] * 5
    finally:
        gc.enable()
