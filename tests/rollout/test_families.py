"""Families: what each says of its own config.json, and one that is added from outside."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import edit_config

from samebit.recipes.models.tiny_model import make_random_model, write_config
from samebit.rollout.engine import Engine
from samebit.rollout.models import registry, supported
from samebit.rollout.models.config import Family, ModelConfig
from samebit.rollout.models.decoder import DenseModel
from samebit.rollout.models.registry import FAMILIES, load_model_config
from samebit.rollout.types import SamplingParams

# What from_hf reads, by the names of transformers.
READ = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "eos_token_id",
}  # fmt: skip
# What changes nothing here, and why.
IDLE = {
    "layer_types": "refused unless all of it is full_attention",
    "sliding_window": "of use_sliding_window, which is refused",
    "max_window_layers": "of use_sliding_window, which is refused",
    "attention_dropout": "nothing is dropped out of what the rollout computed",
    "initializer_range": "of new weights",
    "pretraining_tp": "of an older transformers",
    "use_cache": "of generation",
    "pad_token_id": "nothing is padded",
    "bos_token_id": "the tokenizer's matter",
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_key_that_transformers_has_for_a_family_is_classified(family):
    """A key that a newer transformers computes would else be left out silently."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    own = CONFIG_MAPPING[family.family.model_type]
    general = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    keys = {f.name for f in dataclasses.fields(own)} - general
    assert keys >= {"vocab_size", "rope_parameters"}
    refused = supported._WITHOUT_EFFECT.keys() | family.family.without_effect.keys()
    assert keys - READ - refused - IDLE.keys() == set()
    assert not READ & refused


@pytest.fixture
def qwen2(tmp_path):
    """The folder of a Qwen2's configuration alone."""
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 2}
    write_config(tmp_path, "qwen2", **sizes, num_attention_heads=4, num_key_value_heads=2)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "holds 'sliding_attention'"),
        ({"use_mrope": True}, "use_mrope = True is not supported .only False"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 8}},
            "dual_chunk_attention_config = .*null",
        ),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"num_key_value_heads": None}, "has no num_key_value_heads"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "type 'mrope' is not"),
        ({"model_type": "qwen2_moe"}, 'model_type is "qwen2_moe"; it must be "qwen2"'),
    ],
    ids=str,
)
def test_what_would_change_a_qwen2(qwen2, changes, message):
    edit_config(qwen2, **changes)
    with pytest.raises(ValueError, match=message):
        load_model_config(qwen2)


def test_what_leaves_a_qwen2_as_it_is(qwen2):
    """As its published folders have it."""
    before = load_model_config(qwen2)
    edit_config(
        qwen2, use_sliding_window=False, sliding_window=131072, max_window_layers=28,
        use_mrope=False, layer_types=["full_attention"] * 2, attention_dropout=0.0, use_cache=True,
        bos_token_id=0,
    )  # fmt: skip
    assert load_model_config(qwen2) == before
    assert (before.head_dim, before.num_kv_heads, before.rope_theta) == (12, 2, 1e4)
    assert (before.qkv_bias, before.qk_norm, before.tie_embeddings) == (True, False, False)
    assert load_model_config(qwen2).layer_products["qkv"] == (96, 48, True)


def test_a_qwen2_without_a_bias_is_named(tmp_path, qwen2_path):
    """Its weights, not its configuration, say that biases are there."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(qwen2_path / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.bias"
    assert tensors[name].shape == (32,)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((qwen2_path / "config.json").read_text())
    with pytest.raises(ValueError, match=f"missing: {name}"):
        Engine(tmp_path, device="cpu")


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("x", "qkv")
def test_every_part_of_qkv_matters(qwen2_path, tmp_path, x, part):
    """What is read and not used would go unnoticed where it is small."""
    from safetensors.torch import load_file, save_file

    tensors = {n: t.clone() for n, t in load_file(qwen2_path / "model.safetensors").items()}
    tensors[f"model.layers.2.self_attn.{x}_proj.{part}"] *= 1.5
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((qwen2_path / "config.json").read_text())
    prompt = [list(range(5, 40))]
    found, before = (Engine(f, device="cpu").score(prompt) for f in (tmp_path, qwen2_path))
    assert found != before


def test_a_dummy_model_has_biases(qwen2_path):
    """Random weights for benchmarks: biases of zero would hide their errors."""
    engine = Engine(qwen2_path, device="cpu", load_format="dummy")
    bias = engine.get_weights_by_name("decoder.layers.0.self_attention.linear_qkv.bias")
    assert bias.shape == (128,)
    assert 0.005 < bias.std() < 0.05


class Twin(DenseModel):
    """A family of somebody else's: Qwen3's norms and Qwen2's biases."""

    family = Family(architecture="TwinForCausalLM", model_type="llama")
    qk_norm = True
    qkv_bias = True


class Thief(DenseModel):
    """Claims what another one reads."""

    family = Family(architecture="LlamaForCausalLM", model_type="llama")


def test_a_family_is_added_from_outside(tmp_path, monkeypatch):
    """One class; the engine, and the trainer by the type it derives from, know it."""
    from samebit.trainer.megatron.models.registry import parts_of

    monkeypatch.setattr(registry, "FAMILIES", [*FAMILIES])
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(Twin=Twin, Thief=Thief))
    make_random_model(tmp_path, "llama", seed=1, tied=True)
    with pytest.raises(ValueError, match="own:Twin.*architectures = .*one of the known: TwinFor"):
        load_model_config(tmp_path, "own:Twin")
    with pytest.raises(ValueError, match="own:Thief.*architecture is none of LlamaForCausalLM, Qw"):
        load_model_config(tmp_path, "own:Thief")
    edit_config(tmp_path, architectures=["TwinForCausalLM"])
    config = load_model_config(tmp_path, "own:Twin")
    assert type(config) is type(load_model_config(tmp_path)) is Twin
    engine = Engine(tmp_path, device="cpu", load_format="dummy")
    layer = "decoder.layers.0.self_attention"
    assert {f"{layer}.linear_qkv.bias", f"{layer}.k_layernorm.weight"} <= engine.weights.keys()
    [[completion]] = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))
    assert all(torch.tensor(completion.logprobs).isfinite())
    settings = parts_of(config).settings(config)
    assert (settings["qk_layernorm"], settings["add_qkv_bias"]) == (True, True)


def test_a_model_that_megatron_does_not_know_is_refused():
    from samebit.trainer.megatron.models.registry import parts_of

    class Strange(ModelConfig):
        """Nothing is asked of it but its type."""

        architecture = "Strange"

    Strange.__abstractmethods__ = frozenset()
    with pytest.raises(ValueError, match="Strange has no Megatron parts: it can be served, not"):
        parts_of(object.__new__(Strange))


def test_models_are_told_apart(qwen2, tmp_path):
    """Two families of equal sizes are two models; an update of weights asks."""
    other = tmp_path / "llama"
    config = json.loads((qwen2 / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    assert load_model_config(other) != load_model_config(qwen2)
