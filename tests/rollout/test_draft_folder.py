"""Drafts' folders in both dialects: exactly the tensors and keys that others read, and nothing that
is missing, unknown or ambiguous taken in silence."""

import json
from dataclasses import replace

import pytest
import torch
from draft_cases import LLAMA3, OPTIONS, make_config, make_params, make_vocabulary
from helpers import assert_same_bits, edit_config, edit_tensors, tree
from safetensors.torch import load_file, save_file

from samebit.rollout.models.draft.config import OUTPUT
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.runtime.draft_folder import open_draft, write_draft
from samebit.rollout.runtime.weight_files import WeightLoadError

IDS = "eagle_aux_hidden_state_layer_ids"
LAYER = {
    "input_layernorm.weight": [24],
    "hidden_norm.weight": [24],
    "self_attn.q_proj.weight": [24, 48],
    "self_attn.k_proj.weight": [12, 48],
    "self_attn.v_proj.weight": [12, 48],
    "self_attn.o_proj.weight": [24, 24],
    "post_attention_layernorm.weight": [24],
    "mlp.gate_proj.weight": [40, 24],
    "mlp.up_proj.weight": [40, 24],
    "mlp.down_proj.weight": [24, 40],
}
REST = {
    "fc.weight": [24, 72],
    "norm.weight": [24],
    "lm_head.weight": [29, 24],
    "d2t": [29],
    "t2d": [61],
}
OTHERS = {
    "eagle3": {},
    "eagle3.1": {f"fc_norm.{i}.weight": [24] for i in range(3)},
    "speculators": {"input_norm.weight": [72]},
    "own width": {"fc.weight": [24, 80], "embed_tokens.weight": [61, 24]},
    "block": {f"fc_norm.{i}.weight": [24] for i in range(3)} | {"mask_hidden": [1, 1, 72]},
}
LAYER_KEYS = {
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "max_position_embeddings", "vocab_size", "tie_word_embeddings",
    "torch_dtype", "pad_token_id", "bos_token_id", "eos_token_id", "attention_bias",
}  # fmt: skip
DIALECTS = {"sglang": "midlayer.", "speculators": "layers.0."}


@pytest.fixture
def written(tmp_path):
    """written(dialect, name of the options, **more): a folder of such a draft."""

    def write(dialect="sglang", name="eagle3", dtype=None, **more):
        config = make_config(**OPTIONS[name] | more)
        params = make_params(config)
        write_draft(tmp_path / "draft", config, make_vocabulary(config), params, dialect, dtype)
        return tmp_path / "draft"

    return write


UNSAID = [("sglang", name) for name in ("speculators", "own width", "block")]
CASES = [(d, name) for d in DIALECTS for name in OPTIONS if (d, name) not in UNSAID]


@pytest.mark.parametrize(("dialect", "name"), CASES)
def test_a_folder_has_exactly_the_tensors_of_its_dialect(written, dialect, name):
    tensors = load_file(written(dialect, name) / "model.safetensors")
    layer = {DIALECTS[dialect] + key: shape for key, shape in LAYER.items()}
    assert {key: list(x.shape) for key, x in tensors.items()} == layer | REST | OTHERS[name]
    floats = {x.dtype for key, x in tensors.items() if key not in ("d2t", "t2d")}
    assert floats == {torch.float32}
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    config = make_config(**OPTIONS[name])
    target_ids = tensors["d2t"] + torch.arange(29)
    assert torch.equal(target_ids, make_vocabulary(config).token_ids)
    assert torch.equal(tensors["t2d"].nonzero().flatten(), target_ids)


def test_the_keys_of_the_sglang_dialect(written):
    keys = json.loads((written() / "config.json").read_text())
    assert keys.keys() == LAYER_KEYS | {"architectures", "draft_vocab_size", "eagle_config"}
    assert keys["architectures"] == ["LlamaForCausalLMEagle3"]
    assert keys["eagle_config"] == {
        IDS: [0, 1, 2],
        "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
    }
    assert (keys["eos_token_id"], keys["torch_dtype"]) == ([2, 3], "float32")
    more = json.loads((written(name="eagle3.1") / "config.json").read_text())
    assert {k: more[k] for k in more.keys() - keys.keys()} == {
        "fc_norm": True,
        "norm_output": True,
    }
    wide = {"target_hidden_size": 20, "owns_embedding": True}
    assert json.loads((written(**wide) / "config.json").read_text())["target_hidden_size"] == 20


def test_the_keys_of_the_speculators_dialect(written):
    keys = json.loads((written("speculators", "speculators") / "config.json").read_text())
    assert keys["transformer_layer_config"].keys() == LAYER_KEYS
    assert {k: v for k, v in keys.items() if k != "transformer_layer_config"} == {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": 29,
        "target_hidden_size": 24,
        "norm_before_residual": True,
        "norm_before_fc": True,
        "fc_norm": False,
        "norm_output": True,
        "embed_requires_grad": False,
        IDS: [1, 2, 3],
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": 3,
                    "accept_tolerance": 0.0,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]},
        },
    }
    block = json.loads((written("speculators", "block") / "config.json").read_text())
    assert block["architectures"] == ["PEagleDraftModel"]
    assert block["speculators_model_type"] == block["speculators_config"]["algorithm"] == "peagle"
    assert block["mask_token_id"] == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dialect", "name"), CASES)
def test_what_is_read_is_written_again_to_the_byte(written, dialect, name, dtype):
    """And what is read is what was meant, layer ids included; also of a scaled rotation."""
    folder = written(dialect, name, dtype, rope_scaling=LLAMA3, rope_theta=5e5)
    before = tree(folder)
    found = open_draft(folder, num_target_layers=4)
    config = make_config(**OPTIONS[name], rope_scaling=LLAMA3, rope_theta=5e5)
    expected = config if dialect == "speculators" else replace(config, verifier=None)
    assert found.config == expected
    assert (found.dialect, found.dtype) == (dialect, dtype)
    params = {s.name: torch.ones(s.shape, dtype=dtype) for s in config.param_specs()}
    found.fill(params)
    for key, param in make_params(config).items():
        assert_same_bits(params[key], param.to(dtype), key)
    write_draft(folder, found.config, found.vocabulary, params, dialect)
    assert tree(folder) == before


def test_the_dialects_name_the_same_layers_by_other_ids(written):
    """Outputs of layers in one, inputs in the other: a file taken for the other's is off by one."""
    for dialect in DIALECTS:
        folder = written(dialect, captured_layers=(2, 16, 29))
        keys = json.loads((folder / "config.json").read_text())
        ids = keys["eagle_config"][IDS] if dialect == "sglang" else keys[IDS]
        assert ids == ([1, 15, 28] if dialect == "sglang" else [2, 16, 29])
        assert open_draft(folder).config.captured_layers == (2, 16, 29)
        with pytest.raises(ValueError, match="the target has streams after 0 to 28 layers"):
            open_draft(folder, num_target_layers=28)
        edit_config(folder, **{"eagle_config" if dialect == "sglang" else IDS: None})
        assert open_draft(folder, 32).config.captured_layers == (2, 16, 29)
        with pytest.raises(ValueError, match="its target's number of layers must be given"):
            open_draft(folder)


def test_norm_output_of_the_sglang_dialect_is_asked_for(written):
    """Unless our own marker says whose it is."""
    folder = written()
    edit_config(folder, norm_output=True)
    with pytest.raises(
        ValueError, match="norm_output is true, which is ambiguous: SGLang and vLLM"
    ):
        open_draft(folder)
    assert open_draft(folder, norm_output="sglang").config.feeds_normed
    assert not open_draft(folder, norm_output="specforge").config.feeds_normed
    edit_config(folder, norm_output=False)
    with pytest.raises(ValueError, match="norm_output is false, which is ambiguous"):
        open_draft(folder)
    assert not open_draft(folder, norm_output="sglang").config.feeds_normed
    with pytest.raises(ValueError, match="norm_output is false; it must be true or absent"):
        open_draft(folder, norm_output="specforge")
    with pytest.raises(ValueError, match="it must be sglang, specforge or unset"):
        open_draft(folder, norm_output="vllm")
    with pytest.raises(ValueError, match="needs no explanation"):
        open_draft(written("speculators"), norm_output="sglang")
    (written(name="eagle3.1") / ".samebit").unlink()
    with pytest.raises(ValueError, match="norm_output is true, which is ambiguous"):
        open_draft(folder)


def wrong_tensors(tensors):
    """Missing, unknown, misshapen and of another dtype."""
    tensors["fc.bias"] = torch.zeros(24)
    tensors["layers.0.hidden_norm.weight"] = tensors.pop("midlayer.hidden_norm.weight")
    tensors["midlayer.self_attn.k_proj.weight"] = torch.zeros(24, 48)
    tensors["norm.weight"] = tensors["norm.weight"].bfloat16()
    tensors["d2t"] = tensors["d2t"].int()


def test_every_tensor_that_does_not_fit_is_named(written):
    folder = written()
    edit_tensors(folder, wrong_tensors)
    with pytest.raises(WeightLoadError) as error:
        open_draft(folder)
    assert str(error.value).splitlines()[1:] == [
        "  missing: midlayer.hidden_norm.weight",
        "  unknown: fc.bias",
        "  unknown: layers.0.hidden_norm.weight",
        "  dtype of d2t: I32; it must be I64",
        "  shape of midlayer.self_attn.k_proj.weight: (24, 48) in the file, (12, 48) by "
        "config.json",
        "  dtype of norm.weight: BF16; it must be float32 as all others",
    ]


def test_a_layer_of_the_other_dialect_is_unknown(written):
    folder = written("speculators")
    edit_tensors(folder, lambda x: x.update({"midlayer.hidden_norm.weight": torch.zeros(24)}))
    with pytest.raises(WeightLoadError, match="unknown: midlayer.hidden_norm.weight .of another"):
        open_draft(folder)


def test_d2t_may_be_missing_only_where_nothing_is_reduced(written):
    def without(tensors):
        del tensors["d2t"], tensors["t2d"]

    folder = written()
    edit_tensors(folder, without)
    with pytest.raises(WeightLoadError, match="missing: d2t\n  missing: t2d$"):
        open_draft(folder)
    folder = written(draft_vocab_size=61)
    edit_tensors(folder, without)
    assert torch.equal(open_draft(folder).vocabulary.token_ids, torch.arange(61))
    edit_tensors(folder, lambda tensors: tensors.update(d2t=torch.zeros(61, dtype=torch.int64)))
    with pytest.raises(WeightLoadError, match="missing: t2d$"):
        open_draft(folder)


def test_tensors_of_the_vocabulary_must_agree(written):
    folder = written()
    edit_tensors(folder, lambda tensors: tensors["d2t"].__setitem__(5, 40))
    with pytest.raises(WeightLoadError, match="d2t and t2d disagree: draft token 5 is 45 by d2t"):
        open_draft(folder)


@pytest.mark.parametrize(
    ("dialect", "changes", "message"),
    [
        ("sglang", {IDS: [1, 2, 3]}, "stands at the top, where some count inputs of layers"),
        (
            "sglang",
            {"norm_before_residual": True},
            "norm_before_residual is true; it must be false",
        ),
        ("sglang", {"architectures": ["DFlashDraftModel"]}, "a list of one of LlamaForCausalLMEag"),
        ("sglang", {"num_hidden_layers": 4}, "num_hidden_layers is 4; it must be 1: a draft is"),
        ("sglang", {"mask_token_id": 5}, "mask_token_id is of a P-EAGLE draft"),
        ("sglang", {"dflash_config": {}}, "dflash_config is of a DFlash draft"),
        ("sglang", {"draft_vocab_size": None}, "borrows the target's is not read"),
        ("sglang", {"draft_vocab_size": 62}, r"an integer in \[1, vocab_size = 61\]"),
        ("sglang", {"tie_word_embeddings": True}, "tie_word_embeddings is true; it must be false"),
        ("sglang", {"bias": True}, "bias is true; it must be false or absent"),
        ("sglang", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("sglang", {"fc_norm": 1}, "fc_norm is 1; it must be true or false"),
        ("sglang", {"fc_norm": True}, "missing: fc_norm.0.weight"),
        ("sglang", {"torch_dtype": "bfloat16"}, "it must be bfloat16 as all others"),
        ("sglang", {"target_hidden_size": 20}, r"owns_embedding is False; it must be true"),
        ("sglang", {"eagle_config": {"use_mtp_layernorm": True}}, "it must be false or absent"),
        ("sglang", {"eagle_config": {"layers": [1]}}, "eagle_config.layers is unknown; known are"),
        ("sglang", {"eagle_config": {IDS: []}}, "a list of layer ids from 0 on"),
        ("speculators", {"norm_before_residual": None}, "speculators takes false, and vLLM true"),
        ("speculators", {"eagle_config": {IDS: [1]}}, "eagle_config is of the sglang dialect"),
        ("speculators", {"speculators_model_type": "dflash"}, 'must be "eagle3" or "peagle"'),
        ("speculators", {"speculators_model_type": "peagle"}, "one of PEagleDraftModel, PEagleSp"),
        ("speculators", {"mask_token_id": 5}, "mask_token_id is of a P-EAGLE draft"),
        (
            "speculators",
            {"transformer_layer_config": {"model_type": "qwen3"}},
            'it must be "llama"',
        ),
        ("speculators", {"speculators_config": {"algorithm": "eagle"}}, 'it must be "eagle3"'),
    ],
    ids=str,
)
def test_what_is_ambiguous_or_not_computed_is_refused(written, dialect, changes, message):
    folder = written(dialect)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        open_draft(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mask_token_id": None},
            r"has no mask_token_id; it must be a token's id, in \[0, vocab_",
        ),
        ({"mask_token_id": 61}, "mask_token_id is 61"),
        ({"norm_output": True}, "feeds_normed is True; it must be false with mask_token_id"),
        ({"speculators_config": {"algorithm": "eagle3"}}, 'it must be "peagle"'),
    ],
    ids=str,
)
def test_block_drafts_that_are_refused(written, changes, message):
    folder = written("speculators", "block")
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        open_draft(folder)


def test_what_a_dialect_cannot_say_is_not_written(written, tmp_path):
    with pytest.raises(ValueError, match="the sglang dialect has no norm_before_residual"):
        written("sglang", "speculators")
    with pytest.raises(ValueError, match="the sglang dialect has no block drafts"):
        written("sglang", "block")
    with pytest.raises(ValueError, match=r"it has no embeddings \(0\)"):
        written("sglang", "own width")
    with pytest.raises(ValueError, match="names the target; the draft has no verifier"):
        written("speculators", verifier=None)
    with pytest.raises(
        ValueError, match="dialect is 'vllm'; it must be one of sglang, speculators"
    ):
        written("vllm")
    config = make_config()
    with pytest.raises(ValueError, match="a vocabulary of 61 of 61 tokens for a draft of 29 of 61"):
        write_draft(tmp_path / "x", config, DraftVocabulary.whole(61), make_params(config))
    assert not (tmp_path / "x").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    with pytest.raises(FileExistsError):
        write_draft(tmp_path / "mine", config, make_vocabulary(config), make_params(config))


def test_numbers_that_are_none_are_refused(written):
    folder = written()
    edit_tensors(folder, lambda tensors: tensors["fc.weight"].fill_(float("nan")))
    params = make_params(make_config())
    with pytest.raises(WeightLoadError, match="holds NaN or Inf in: draft.fc.weight"):
        open_draft(folder).fill(params)


def test_a_foreign_folder_is_read(tmp_path):
    """As SpecForge leaves it: half precision, no metadata, few keys, and an output layer that is
    padded here."""
    config = make_config()
    shapes = {"midlayer." + key: shape for key, shape in LAYER.items()} | REST
    generator = torch.Generator().manual_seed(1)
    tensors = {k: torch.randn(s, generator=generator).half() for k, s in shapes.items()}
    vocabulary = make_vocabulary(config)
    tensors |= {"d2t": vocabulary.d2t, "t2d": vocabulary.t2d}
    save_file(tensors, tmp_path / "model.safetensors")
    keys = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 24,
        "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
        "vocab_size": 61, "draft_vocab_size": 29, "transformers_version": "4.57.1",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(keys))
    found = open_draft(tmp_path, num_target_layers=12)
    assert found.config == replace(config, verifier=None, token_ids={}, captured_layers=(2, 6, 9))
    assert found.dtype == torch.float16
    params = {s.name: torch.ones(s.shape) for s in found.config.param_specs()}
    found.fill(params)
    assert_same_bits(params[OUTPUT][:29], tensors["lm_head.weight"].float())
    assert not params[OUTPUT][29:].any()
