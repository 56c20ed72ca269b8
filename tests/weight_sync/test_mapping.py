"""Names and shards: every element of a Hugging Face tensor has exactly one place on the ranks."""

from dataclasses import replace

import pytest
import torch

from samebit.recipes.models.tiny_model import write_config
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.registry import load_model_config
from samebit.weight_sync.mapping import (
    collect_hf,
    columns,
    hf_parts,
    hf_shapes,
    hf_tensors,
    load_params,
    parts_of,
)

CASES = {
    f"{name}-{'tied' if tied else 'untied'}": (name, tied)
    for name in ("qwen3", "qwen2", "llama")
    for tied in (False, True)
}


@pytest.fixture(params=CASES)
def config(request, tmp_path) -> ModelConfig:
    """Sizes that divide by 4 ranks, except the vocabulary."""
    architecture, tied = CASES[request.param]
    write_config(
        tmp_path,
        architecture,
        vocab_size=331,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=6,
        tie_word_embeddings=tied,
    )
    return load_model_config(tmp_path)


def numbered(config):
    """Hugging Face tensors in which every element of the model has a number of its own, from 1."""
    tensors, start = {}, 1
    for name, shape in hf_shapes(config.param_specs()).items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + size, dtype=torch.float32).view(shape)
        start += size
    return tensors


def params_of(config, tensors, shard=(0, 1)):
    specs = config.param_specs(shard)
    params = {spec.name: torch.full(spec.shape, torch.nan) for spec in specs}
    load_params(specs, params, parts_of(tensors.__getitem__))
    return specs, params


def test_load_then_export_gives_back_every_tensor(config):
    """A wrong offset in either direction would corrupt each export of a trained model."""
    tensors = numbered(config)
    specs, params = params_of(config, tensors)
    found = dict(hf_tensors(specs, params))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    assert ("lm_head.weight" in found) is not config.tie_embeddings


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_ranks_hold_every_row_of_their_columns(shape):
    """Whichever way the weight is longer."""
    whole = torch.arange(24.0).view(shape)
    for rank in (0, 1):
        spec = columns("p", "hf", shape, (rank, 2))
        params = {"p": torch.full(spec.shape, torch.nan)}
        load_params([spec], params, parts_of({"hf": whole}.__getitem__))
        assert torch.equal(params["p"], whole.chunk(2, dim=1)[rank])


def test_names_are_those_of_transformers(config, tmp_path):
    """A misspelled name or a transposed shape would make folders that nobody else can read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert hf_shapes(config.param_specs()) == expected


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_hold_every_element_once(config, size):
    """A gap or an overlap between shards would lose or double a row at tensor parallel size > 1."""
    tensors = numbered(config)
    whole = torch.cat([t.flatten() for t in tensors.values()]).sort().values
    whole_everywhere = {name for name in tensors if name.endswith("norm.weight")}
    held = []
    for rank in range(size):
        specs, params = params_of(config, tensors, (rank, size))
        assert not any(p.isnan().any() for p in params.values())
        for spec in specs:
            if spec.blocks and spec.blocks[0].hf_name in whole_everywhere:
                assert torch.equal(params[spec.name], tensors[spec.blocks[0].hf_name])
                if rank > 0:
                    continue
            held.append(params[spec.name].flatten())
    found = torch.cat(held)
    assert torch.equal(found[found != 0].sort().values, whole)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_collect_every_tensor_again(config, size):
    """In any order of ranks: a resharded checkpoint is put together like this."""
    tensors, found = numbered(config), {}
    for rank in reversed(range(size)):
        specs, params = params_of(config, tensors, (rank, size))
        collect_hf(specs, params, found)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_tensors_are_asked_for_in_the_order_of_hf_parts(config):
    """Whoever streams a folder reads ahead in that order; each tensor is read once a parameter."""
    tensors, asked = numbered(config), []

    def read(name, index):
        asked.append((name, index))
        return tensors[name][index]

    specs = config.param_specs()
    load_params(specs, {s.name: torch.empty(s.shape) for s in specs}, read)
    assert asked == hf_parts(specs)
    assert [name for name, _ in asked[:5]] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        *(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"),
    ]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocabulary_padding_is_zero_and_at_the_end(config, size):
    """Padding that is not zero, or not the last rows, would become tokens of its own."""
    tensors = numbered(config)
    shards = [params_of(config, tensors, (rank, size))[1] for rank in range(size)]
    names = ["embedding.word_embeddings.weight"]
    names += [] if config.tie_embeddings else ["output_layer.weight"]
    for name, source in zip(names, ("model.embed_tokens.weight", "lm_head.weight"), strict=False):
        rows = torch.cat([params[name] for params in shards])
        assert rows.shape[0] == 1024
        assert torch.equal(rows[:331], tensors[source])
        assert not rows[331:].any()


def test_rows_are_in_megatron_order(config):
    """The engine views linear_qkv as [kv group, (q..., k, v)] and linear_fc1 as [gate; up]."""
    tensors = numbered(config)
    layer = "model.layers.1."
    q, k, v = (tensors[f"{layer}self_attn.{x}_proj.weight"].view(4, -1, 6, 24) for x in "qkv")
    for size in (1, 2, 4):
        for rank in range(size):
            _, params = params_of(config, tensors, (rank, size))
            own = slice(4 // size * rank, 4 // size * (rank + 1))
            qkv = torch.cat([q[own], k[own], v[own]], dim=1).reshape(-1, 24)
            assert torch.equal(params["decoder.layers.1.self_attention.linear_qkv.weight"], qkv)
            if config.qkv_bias:
                biases = (tensors[f"{layer}self_attn.{x}_proj.bias"].view(4, -1, 6) for x in "qkv")
                bias = torch.cat([x[own] for x in biases], dim=1).reshape(-1)
                assert torch.equal(params["decoder.layers.1.self_attention.linear_qkv.bias"], bias)
            gate, up = (
                tensors[f"{layer}mlp.{x}_proj.weight"].chunk(size)[rank] for x in ("gate", "up")
            )
            fc1 = params["decoder.layers.1.mlp.linear_fc1.weight"]
            assert torch.equal(fc1, torch.cat([gate, up]))
            down = tensors[f"{layer}mlp.down_proj.weight"].chunk(size, dim=1)[rank]
            assert torch.equal(params["decoder.layers.1.mlp.linear_fc2.weight"], down)


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({}, 3, r"embedding.word_embeddings.weight rows = 1024 .* size 3"),
        ({"num_kv_heads": 2, "num_heads": 4}, 4, r"linear_qkv.weight kv heads = 2 .* size 4"),
        ({"ffn_size": 42}, 4, r"linear_fc1.weight rows = 42 .* size 4"),
    ],
    ids=["vocabulary", "kv heads", "ffn"],
)
def test_sizes_that_do_not_divide_are_named(config, change, size, message):
    """A silent floor division would drop the remainder's rows."""
    changed = replace(config, **change)
    with pytest.raises(ValueError, match=message):
        changed.param_specs((0, size))
