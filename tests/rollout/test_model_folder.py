"""What a config.json may say: each wrong key is named with its value before a weight is read."""

import json
import re
from pathlib import Path

import pytest
from helpers import edit_config

from samebit.recipes.models import tiny_model
from samebit.rollout.config import as_path
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ABSENT = type  # stands for a key that is left out: JSON has no such value


def edit(folder, **changes):
    """As edit_config, but None is written as null and ABSENT takes the key away."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ABSENT}))


def refuses(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_model_config(folder)
    assert f"{folder}/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not JSON: Expecting"),
        ("", "config.json is not JSON"),
        ("[1]", r"config.json holds \[1\]; it must be a JSON object"),
        ('"qwen3"', 'config.json holds "qwen3"; it must be'),
        (b"\xff\xfe{}", "config.json is not JSON: 'utf-8' codec"),
    ],
)
def test_a_file_that_is_no_configuration(model_copy, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (model_copy / "config.json").write_bytes(content)
    refuses(model_copy, message)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_missing(model_copy, key):
    """transformers fills in one of its own: 32 layers, 4,096 wide."""
    edit(model_copy, **{key: ABSENT})
    refuses(model_copy, f"config.json has no {key}; it must be an integer of at least 1")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", ["4", 64.5, 64.0, 0, -1, True, [4], {}, None])
def test_a_size_of_a_wrong_type(model_copy, key, value):
    edit(model_copy, **{key: value})
    if value is None and key == "num_key_value_heads":  # as many as there are heads
        assert load_model_config(model_copy).num_kv_heads == 4
    elif value is None and key == "head_dim":
        refuses(model_copy, "transformers does not take it: .*head_dim")
    else:
        shown = re.escape(json.dumps(value))
        refuses(model_copy, f"config.json: {key} is {shown}; it must be an integer of at least 1")


NUMBERS = ["1e-6", 0, -1e-6, float("nan"), float("inf"), True, [1]]


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", NUMBERS, ids=str)
def test_a_number_of_a_wrong_type(model_copy, key, value):
    edit(model_copy, **{key: value})
    shown = re.escape(json.dumps(value))
    refuses(model_copy, f"config.json: {key} is {shown}; it must be a number above 0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": ABSENT}, "config.json has no rms_norm_eps"),
        ({"rope_theta": None}, "rope_theta is null"),
        ({"head_dim": 15}, "head_dim is 15; it must be even"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of 3 kv heads"),
        ({"num_key_value_heads": 8}, "num_attention_heads 4 is no multiple of 8 kv heads"),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false"; it must be true or'),
        ({"torch_dtype": "bf16"}, 'torch_dtype is "bf16"; it must be one of float32, bfloat16'),
        ({"dtype": "bf16"}, 'dtype is "bf16"'),
        ({"dtype": "float8_e4m3fn"}, 'dtype is "float8_e4m3fn"'),
        ({"dtype": 16}, "dtype is 16"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures = Qwen3ForCausalLM; it must be a"),
        ({"architectures": None}, "architectures = None; it must be a list with one of"),
        ({"architectures": [["Qwen3ForCausalLM"]]}, "architectures = "),
        ({"model_type": ABSENT}, 'has no model_type; it must be "qwen3"'),
        ({"model_type": "llama"}, 'model_type is "llama"; it must be "qwen3", that of Qwen3For'),
        ({"model_type": None}, "model_type is null"),
        ({"pad_token_id": "x"}, "transformers does not take it: .*pad_token_id"),
    ],
    ids=str,
)
def test_other_keys_of_a_wrong_type(model_copy, changes, message):
    edit(model_copy, **changes)
    refuses(model_copy, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .method 'fp8'. is"),
        ({"quantization_config": {}}, "quantization_config .method None."),
        ({"compression_config": {"quant_method": "x"}}, "compression_config .method 'x'."),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map asks for the folder's own code"),
        ({"transformers_weights": "x.safetensors"}, "transformers_weights = 'x.safetensors' is"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "holds 'sliding_attention'"),
        ({"layer_types": "full_attention"}, "layer_types is .*must be a list"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"residual_multiplier": 0.2}, "residual_multiplier = 0.2"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
        ({"attention_multiplier": 0.1}, "attention_multiplier = 0.1"),
        ({"logits_scaling": 8.0}, "logits_scaling = 8.0"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True"),
        ({"is_causal": False}, "is_causal = False"),
    ],
    ids=str,
)
def test_keys_that_ask_for_another_model(model_copy, changes, message):
    edit(model_copy, **changes)
    refuses(model_copy, message)


WITHOUT_EFFECT = {
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": ["full_attention"] * 3,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 2,
    "residual_multiplier": 1.0,
    "mlp_bias": None,
    "quantization_config": None,
    "num_experts": None,
    "rope_scaling": None,
    "dtype": "bfloat16",
}


def test_keys_that_change_nothing(model_copy):
    before = load_model_config(model_copy)
    edit(model_copy, **WITHOUT_EFFECT)
    after = load_model_config(model_copy)
    rope = {"rope_type": "default", "partial_rotary_factor": 1.0}
    assert after == before.__class__(**{**vars(before), "rope_scaling": rope})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        *[({"rope_type": kind}, f"type '{kind}' is not supported; use default, linear, llama3 or y")
          for kind in ("dynamic", "longrope", "proportional", "mrope", "axial")],
        ({"type": "yarn", "factor": 4.0}, "has no {}.original_max_position_embeddings; it must be"),
        *[({**YARN, **wrong}, f"{{}}.{message}") for wrong, message in (
            ({"factor": None}, "factor is null; it must be a number above 0"),
            ({"beta_fast": "32"}, 'beta_fast is "32"; it must be a number above 0 .rope type .yar'),
            ({"beta_slow": 0}, "beta_slow is 0"),
            ({"attention_factor": -1.0}, "attention_factor is -1.0"),
            ({"mscale": [1]}, r"mscale is \[1\]"),
            ({"mscale_all_dim": True}, "mscale_all_dim is true"),
            ({"truncate": 1}, "truncate is 1; it must be true or false"),
            ({"truncate": None}, "truncate is null; it must be true or false"),
            ({"long_factor": [1.0]}, r"long_factor = \[1.0\] is not supported with rope type"),
        )],
        ({"rope_type": "default", "type": "yarn"}, "has rope_type 'default' and type 'yarn'"),
        ({"rope_type": ["linear"]}, r"type \['linear'\] is not supported"),
        ("linear", ' is "linear"; it must be a JSON object'),
        ({"type": "linear"}, r"config.json has no {}.factor; it must be a number above 0"),
        ({"type": "linear", "factor": "4"}, r'{}.factor is "4"; it must be a number above 0'),
        ({"type": "linear", "factor": 0}, "{}.factor is 0; it must be"),
        ({"factor": 4.0}, "{}.factor = 4.0 is not supported with rope type 'default'"),
        *[({k: v for k, v in LLAMA3.items() if k != name}, f"has no {{}}.{name}; it must be")
          for name in list(LLAMA3)[1:]],
        ({**LLAMA3, "low_freq_factor": "1"}, '{}.low_freq_factor is "1"'),
        ({**LLAMA3, "high_freq_factor": 1.0}, "{}.high_freq_factor is 1.0; it must be above low"),
        ({**LLAMA3, "partial_rotary_factor": 0.5}, "{}.partial_rotary_factor = 0.5 is not sup"),
        ({"rope_type": "default", "rope_theta": "x"}, '{}.rope_theta is "x"'),
        ({"rope_type": "default", "mrope_section": [1]}, r"{}.mrope_section = \[1\] is not sup"),
    ],
    ids=lambda x: str(x)[:60],
)  # fmt: skip
def test_rotations_that_are_not_computed(model_copy, key, rope, message):
    """Named when the configuration is read, not when the table is made."""
    edit(model_copy, **{key: rope})
    refuses(model_copy, message.replace("{}", key))


def test_rotations_said_twice(model_copy):
    edit(model_copy, rope_scaling=LLAMA3, rope_parameters={"rope_type": "default"})
    refuses(model_copy, "rope_scaling and rope_parameters differ")
    edit(model_copy, rope_scaling=ABSENT, rope_parameters={"rope_theta": 5e5}, rope_theta=1e6)
    refuses(model_copy, "rope_parameters.rope_theta is 500000.0; it must be rope_theta, 1000000.0")
    edit(model_copy, rope_parameters=YARN, rope_theta=ABSENT, original_max_position_embeddings=32)
    refuses(
        model_copy, "original_max_position_embeddings is 64; it must be original_.*, 32, or abs"
    )


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
@pytest.mark.parametrize("scaling", [LLAMA3, {**YARN, "truncate": False, "mscale": None}], ids=str)
def test_rotations_that_are(model_copy, key, name, scaling):
    """In both places and both spellings."""
    rope = {name: scaling["rope_type"], **{k: v for k, v in scaling.items() if k != "rope_type"}}
    edit(model_copy, **{key: rope}, rope_theta=5e5)
    config = load_model_config(model_copy)
    assert (config.rope_scaling or {}).items() >= scaling.items()
    assert config.rope_theta == 5e5


def test_what_a_llama_may_leave_out(llama_path, tmp_path):
    """Its family's own defaults: as many kv heads as heads, heads as wide as they divide."""
    (tmp_path / "config.json").write_text((llama_path / "config.json").read_text())
    edit_config(tmp_path, num_key_value_heads=None, head_dim=None)
    config = load_model_config(tmp_path)
    assert (config.num_kv_heads, config.head_dim) == (6, 8)
    edit(tmp_path, num_attention_heads=5)
    refuses(tmp_path, "hidden_size 48 is no multiple of num_attention_heads 5")


def test_the_context_of_a_model(model_copy):
    config = load_model_config(model_copy)
    config.require_context(1024, "prompt + completion")
    message = r"prompt \+ completion = 1025 tokens; the model's context .* holds 1024"
    with pytest.raises(ValueError, match=message):
        config.require_context(1025, "prompt + completion")


@pytest.mark.parametrize("shape", ["qwen2.5-7b", "qwen3-0.6b", "qwen3-4b", "qwen3-8b"])
def test_the_shapes_of_the_benchmarks(shape):
    folder = Path(tiny_model.__file__).parents[1] / "bench" / "shapes" / shape
    assert load_model_config(folder).eos_token_ids == (151645,)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Qwen/Qwen3-8B", "model folder Qwen/Qwen3-8B does not exist .nothing is fetched from a"),
        (__file__, "test_model_folder.py is a file; give the folder"),
    ],
)
def test_paths_that_are_no_folder(path, message):
    with pytest.raises(FileNotFoundError, match=message):
        Engine(path)


@pytest.mark.parametrize("path", [5, None, b"model", ["model"], ""])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match="Engine model_path is .*; it must be the path of a local"):
        Engine(path)
    with pytest.raises(ValueError, match="x is "):
        as_path(path, "x")
