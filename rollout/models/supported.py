"""What a config.json may say: sizes by type, and no key that asks for what we do not compute.

Keys are refused by name, not admitted: folders carry many that nobody computes (pretraining_tp,
unsloth_version). What transformers knows of a family is classified in full, which a test holds; the
rest are keys by which other code has been seen to make another model.
"""

from collections.abc import Collection, Mapping
from typing import Any

from samebit.kernels.rope import OPTIONAL_KEYS, SCALING_KEYS
from samebit.rollout.models.json_file import JsonFile, is_list, is_positive, is_size

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_NOTHING: Any = ()

# Keys that change any model, and the values under which they do not; null never does.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "rope_interleaved": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1,),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "attention_multiplier": _NOTHING,
    "key_multiplier": (1,),
    "logits_multiplier": (1,),
    "lm_head_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "query_pre_attn_scalar": _NOTHING,
    "attn_logit_softcapping": _NOTHING,
    "final_logit_softcapping": _NOTHING,
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "num_experts_per_tok": (0,),
    "per_layer_config": _NOTHING,
    "transformers_weights": _NOTHING,
}


def require_supported(
    config: JsonFile, explicit: Collection[str], without_effect: Mapping[str, tuple[Any, ...]]
) -> None:
    """ValueError that names the first key of a config.json which is wrong or not computed here.

    explicit: keys for which transformers would silently take a number of its own. without_effect: a
    family's own keys, with the values under which they change nothing.
    """
    _refuse_quantised_and_code(config)
    for key, values in {**_WITHOUT_EFFECT, **without_effect}.items():
        value = config.get(key)
        if value is not None and value not in values:
            right = f"only {values[0]!r}" if values else "only null"
            raise ValueError(f"{config.path}: {key} = {value!r} is not supported ({right})")
    for kind in config.require_if_given("layer_types", is_list, "a list of texts") or ():
        if kind != "full_attention":
            raise ValueError(
                f"{config.path}: layer_types holds {kind!r}, which is not supported (only "
                "'full_attention')"
            )
    _require_sizes(config, explicit)
    _require_rope(config)


def _refuse_quantised_and_code(config: JsonFile) -> None:
    for key in ("quantization_config", "compression_config"):
        value = config.get(key)
        if value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise ValueError(
                f"{config.path}: {key} (method {method!r}) is not supported: quantised weights "
                "cannot be read; give the folder of the model in bf16 or fp32"
            )
    if config.get("auto_map"):
        raise ValueError(
            f"{config.path}: auto_map asks for the folder's own code, which is never run; give a "
            "folder that transformers reads without trust_remote_code"
        )


def _require_sizes(config: JsonFile, explicit: Collection[str]) -> None:
    right = "an integer of at least 1"
    for key in _SIZES:
        config.require(key, is_size, right)
    for key in ("num_key_value_heads", "head_dim"):
        if key in explicit and key not in config.values:
            raise config.wrong(key, right)
        config.require_if_given(key, is_size, right)
    heads = config.values["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(
            f"{config.path}: num_attention_heads {heads} is no multiple of {kv_heads} kv heads"
        )
    hidden = config.values["hidden_size"]
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"{config.path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
        )
    head_dim = config.get("head_dim") or hidden // heads
    if head_dim % 2:
        raise ValueError(
            f"{config.path}: head_dim is {head_dim}; it must be even, as rope turns pairs"
        )
    config.require("rms_norm_eps", is_positive, "a number above 0")
    config.require_if_given("tie_word_embeddings", lambda x: type(x) is bool, "true or false")
    for key in ("dtype", "torch_dtype"):
        config.require_if_given(key, lambda x: x in _DTYPES, f"one of {', '.join(_DTYPES)}")


def _require_rope(config: JsonFile) -> None:
    """One way to say the rotation, of a kind that kernels/rope.py knows, with all its numbers."""
    given = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = config.require_if_given(key, lambda x: isinstance(x, dict), "a JSON object")
        if found:
            given[key] = found
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        raise ValueError(
            f"{config.path}: rope_scaling and rope_parameters differ; give only one of them"
        )
    if "rope_theta" in config.values:
        config.require("rope_theta", is_positive, "a number above 0")
    for key, values in given.items():
        rope = JsonFile(config.path, {f"{key}.{name}": value for name, value in values.items()})
        _require_scaling(rope, key, config)


def _require_scaling(rope: JsonFile, prefix: str, config: JsonFile) -> None:
    names = [rope.get(f"{prefix}.{name}") for name in ("rope_type", "type")]
    kinds = [name for name in names if name is not None]
    kind = kinds[0] if kinds else "default"
    if kinds[1:] not in ([], [kind]):
        raise ValueError(f"{config.path}: {prefix} has rope_type {kind!r} and type {kinds[1]!r}")
    if not isinstance(kind, str) or kind not in SCALING_KEYS:
        *most, last = SCALING_KEYS
        raise ValueError(
            f"{config.path}: {prefix} type {kind!r} is not supported; use {', '.join(most)} or "
            f"{last}"
        )
    for name in SCALING_KEYS[kind]:
        key, number = f"{prefix}.{name}", f"a number above 0 (rope type {kind!r})"
        if name not in OPTIONAL_KEYS:
            rope.require(key, is_positive, number)
        elif name != "truncate":
            rope.require_if_given(key, is_positive, number)
        elif key in rope.values:  # transformers takes null for false
            rope.require(key, lambda x: type(x) is bool, "true or false")
    low, high = (rope.get(f"{prefix}.{x}_freq_factor") for x in ("low", "high"))
    if kind == "llama3" and low >= high:
        raise rope.wrong(f"{prefix}.high_freq_factor", f"above low_freq_factor, {low}")
    for name in ("rope_theta", *SCALING_KEYS[kind]):
        _require_said_once(rope, prefix, name, config)
    idle = {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}
    for key, value in rope.values.items():
        name = key.removeprefix(f"{prefix}.")
        neutral = value is None or (name == "partial_rotary_factor" and value == 1)
        if name not in idle and name not in SCALING_KEYS[kind] and not neutral:
            raise ValueError(
                f"{config.path}: {key} = {value!r} is not supported with rope type {kind!r}"
            )


def _require_said_once(rope: JsonFile, prefix: str, name: str, config: JsonFile) -> None:
    """Of a number that is also a key of its own, which transformers would take, or not."""
    key, own = f"{prefix}.{name}", config.get(name)
    if key in rope.values and name == "rope_theta":
        rope.require(key, is_positive, "a number above 0")
    if key in rope.values and own is not None and rope.values[key] != own:
        raise rope.wrong(key, f"{name}, {own}, or absent")
