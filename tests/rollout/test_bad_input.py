"""Bad input to the engine: a clear error that names field and value, and the engine works on."""

import math
import re

import pytest
import torch
from helpers import edit_config, edit_tensors, make_prompts, outcomes

from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

PROMPTS = make_prompts(5, 40)
PARAMS = SamplingParams(n=2, max_new_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def small(make_engine):
    """An engine of 120 context tokens and 128 KV tokens."""
    return make_engine(max_model_len=120, kv_cache_tokens=128, page_size=16)


@pytest.fixture(scope="module")
def truth(make_engine):
    return outcomes(make_engine().generate(PROMPTS, PARAMS))


@pytest.fixture
def still_works(small, truth):
    """After the test, the engine has no leftovers and gives the usual bits."""
    yield
    assert not small.has_unfinished_requests
    assert outcomes(small.generate(PROMPTS, PARAMS)) == truth
    small.flush_cache()
    assert small.pool.num_free == small.pool.num_pages


# -- requests ----------------------------------------------------------------------------------

BAD_PROMPTS = [
    ([[]], "prompt 0 is empty"),
    ([[1], [2], []], "prompt 2 is empty"),
    ([[1, 331]], r"prompt 0: token 331 at position 1 .*\[0, 331\)"),
    ([[1], [5, 7, -1]], "prompt 1: token -1 at position 2"),
    ([[1], [5, 7.5]], "prompt 1: token 7.5 at position 1 is not an integer"),
    ([[1 << 70]], f"token {1 << 70}"),
    ([9, 9], "prompt 0 is 9; it must be a list of token ids"),
    ([[1] * 115], "115 prompt tokens [+] 6 max_new_tokens exceed the context of 120"),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS, ids=lambda x: str(x)[:30])
def test_bad_prompts(small, still_works, prompts, message):
    with pytest.raises(ValueError, match=message):
        small.generate(prompts, PARAMS)
    with pytest.raises(ValueError, match=message.replace("1: ", "0: ").replace("2 is", "0 is")):
        small.add_request(prompts[-1], PARAMS)


def test_a_request_over_the_kv_cache(make_engine):
    """It could never finish: refused at once instead of waiting for ever."""
    engine = make_engine(kv_cache_tokens=64, page_size=16)
    with pytest.raises(ValueError, match="59 prompt tokens [+] 6 .* exceed the KV cache of 64"):
        engine.generate([[1] * 59], PARAMS)
    with pytest.raises(ValueError, match="65 prompt tokens [+] 0 .* exceed the KV cache of 64"):
        engine.score([[1] * 65])
    [group] = engine.generate([[1] * 58], PARAMS)  # exactly full
    assert [len(c.token_ids) for c in group] == [6, 6]


BAD_PARAMS = [
    ("temperature", -0.5),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_k", -1),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("min_p", math.nan),
    ("n", 0),
    ("max_new_tokens", 0),
    ("min_new_tokens", -1),
    ("min_new_tokens", 129),
    ("seed", -1),
    ("seed", 1 << 64),
]


@pytest.mark.parametrize(("field", "value"), BAD_PARAMS)
def test_bad_sampling_params(field, value):
    with pytest.raises(ValueError, match=rf"SamplingParams\.{field} is {re.escape(str(value))}"):
        SamplingParams(**{field: value})


BAD_CALLS = [
    ({"sampling_params": [PARAMS]}, "1 sampling_params for 2 prompts"),
    ({"sample_ids": [[0, 1], [1, 2]]}, "sample id 1 is used twice"),
    ({"sample_ids": [[0, 1], [2]]}, r"groups of \[2, 1\].* n = \[2, 2\]"),
    ({"sample_ids": [[0, 1]]}, r"groups of \[2\].* n = \[2, 2\]"),
    ({"sample_ids": [[0, 1], [2, -3]]}, "sample id -3 is no unsigned"),
    ({"sample_ids": [[0, 1], [2, 1.5]]}, "sample id is 1.5; it must be an integer"),
    ({"return_hidden_states": [0.5]}, "layer is 0.5; it must be an integer"),
    ({"sample_ids": [[0, 1], [2, 1 << 64]]}, f"sample id {1 << 64} is no unsigned"),
    ({"return_hidden_states": [1, 4]}, r"layer 4 is not in \[0, 3\]"),
    ({"return_hidden_states": [-1]}, "layer -1 is not in"),
    (
        {"sampling_params": SamplingParams(n=2, max_new_tokens=6, stop_token_ids=[3, 400])},
        "stop_token_ids: token 400 at position 1",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS, ids=lambda x: str(x)[:40])
def test_bad_calls(small, still_works, arguments, message):
    with pytest.raises(ValueError, match=message):
        small.generate(PROMPTS, **{"sampling_params": PARAMS, **arguments})


@pytest.mark.parametrize(
    ("sequences", "temperature", "message"),
    [
        ([[1, 2], [3]], 1.0, "score sequence 1 has 1 tokens"),
        ([[]], 1.0, "score sequence 0 has 0 tokens"),
        ([[1, 2, 331]], 1.0, "token 331 at position 2"),
        ([[1] * 121], 1.0, "121 prompt tokens .* exceed the context of 120"),
        ([[1, 2]], 0.0, "score temperature is 0.0"),
        ([[1, 2]], -1.0, "score temperature is -1.0"),
        ([[1, 2]], math.nan, "score temperature is nan"),
        ([[1, 2]], math.inf, "temperature is inf"),
    ],
)
def test_bad_scores(small, still_works, sequences, temperature, message):
    with pytest.raises(ValueError, match=message):
        small.score(sequences, temperature)


def test_a_bad_prompt_among_good_ones_starts_nothing(small, still_works):
    """Everything is checked before anything runs."""
    with pytest.raises(ValueError, match="prompt 2: token 999"):
        small.generate([*PROMPTS, [999]], PARAMS)
    assert not small.has_unfinished_requests


def test_unknown_names(small, still_works):
    with pytest.raises(KeyError, match="no unfinished request '12345'"):
        small.abort_request("12345")
    with pytest.raises(KeyError, match="no.such.weight"):
        small.get_weights_by_name("no.such.weight")


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 0}, "engine.page_size is 0"),
        ({"max_batch_tokens": 0}, "engine.max_batch_tokens is 0"),
        ({"max_num_seqs": -1}, "engine.max_num_seqs is -1"),
        ({"prefill_chunk": 0}, "engine.prefill_chunk is 0"),
        ({"max_model_len": 0}, "engine.max_model_len is 0"),
        ({"max_model_len": 10**6}, "engine.max_model_len is 1000000; the model has [0-9]+ posi"),
        ({"kv_cache_tokens": 63}, "engine.kv_cache_tokens is 63.*one page of 64"),
        ({"load_format": "pickle"}, "engine.load_format is 'pickle'"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16.*torch.float32"),
        ({"dtype": torch.float16}, "dtype is torch.float16.*torch.float32"),
        ({"dtype": "float33"}, "dtype is float33.*torch.float32"),
        ({"seed": -1}, "engine.seed is -1"),
        ({"seed": 1 << 64}, f"engine.seed is {1 << 64}"),
    ],
    ids=str,
)
def test_bad_settings(make_engine, settings, message):
    with pytest.raises(ValueError, match=message):
        make_engine(**settings)


def test_cuda_without_a_gpu(make_engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device=cuda .* no CUDA device; use device=cpu"):
        make_engine(device="cuda")


# -- folders ---------------------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"model folder {tmp_path}/nothing does not exist"):
        Engine(tmp_path / "nothing")


def test_missing_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"model folder {tmp_path} has no config.json"):
        Engine(tmp_path)


def test_missing_weights(model_copy):
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{model_copy} holds no .*safetensors"):
        Engine(model_copy)


def test_missing_shard(model_copy):
    index = '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
    (model_copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FileNotFoundError, match="absent: model-00001-of-00002.safetensors"):
        Engine(model_copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"architectures": None}, r"architectures = \[\]"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window = True"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of 3"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "no rope_scaling.original_max_p"),
    ],
    ids=str,
)
def test_unsupported_configs(model_copy, changes, message):
    edit_config(model_copy, **changes)
    with pytest.raises(ValueError, match=message):
        Engine(model_copy)


def test_every_wrong_tensor_is_listed(model_copy):
    """Missing, extra and misshapen ones in one message, so that one look is enough."""

    def damage(tensors):
        for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
            del tensors[name]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(64, 48)

    edit_tensors(model_copy, damage)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        Engine(model_copy)
    for line in (
        "missing: model.norm.weight",
        "missing: model.layers.1.mlp.up_proj.weight",
        "extra: model.layers.7.mlp.up_proj.weight",
        "extra: model.layers.0.self_attn.q_proj.bias",
        "shape of model.layers.2.self_attn.k_proj.weight: (64, 48) in the file, (32, 48) in the",
    ):
        assert line in str(caught.value)


def test_untied_folder_under_a_tied_config(model_copy):
    """A head that differs from the embedding is not silently dropped; an equal one is fine."""
    edit_config(model_copy, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        Engine(model_copy)

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(model_copy, tie)
    assert "output_layer.weight" not in Engine(model_copy).weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_not_loaded(model_copy, value):
    edit_tensors(model_copy, lambda t: t["model.layers.1.mlp.up_proj.weight"][3:4, 5].fill_(value))
    with pytest.raises(ValueError, match=r"NaN or Inf in: decoder.layers.1.mlp.linear_fc1.weight"):
        Engine(model_copy)
