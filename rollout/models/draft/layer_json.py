"""What both dialects say of a draft's layer in the same keys: sizes, rotation, token ids."""

from collections.abc import Collection
from typing import Any

from samebit.rollout.models.draft.config import DraftConfig, default_layers, require_layers
from samebit.rollout.models.json_file import JsonFile, is_list, is_size
from samebit.rollout.models.supported import require_supported

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
DTYPES = ("torch_dtype", "dtype")
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
"""One key, and two meanings: each dialect's file says which."""
# Keys of drafts of other kinds, none of which is an Eagle-3 layer.
_OTHER_DRAFTS = {
    "dflash_config": "DFlash",
    "block_size": "DFlash",
    "markov_rank": "DSpark",
    "mask_token_id": "P-EAGLE",
    "pard_token": "P-EAGLE",
}


def require_eagle3(written: JsonFile, but: Collection[str] = ()) -> None:
    """ValueError for a key that only drafts of other kinds have; `but`: what this one has."""
    for key, kind in _OTHER_DRAFTS.items():
        if written.get(key) is not None and key not in but:
            raise ValueError(
                f"{written.path}: {key} is of a {kind} draft; read are Eagle-3's, and P-EAGLE's in "
                "the speculators dialect"
            )


def read_layer(written: JsonFile) -> dict[str, Any]:
    """DraftConfig's sizes and rotation; ValueError that names a key that is wrong, or of a layer
    that is not computed here."""
    written.require("model_type", lambda x: x == "llama", '"llama": no other layer is computed')
    written.require("num_hidden_layers", lambda x: x == 1, "1: a draft is one layer")
    require_flag(written, "tie_word_embeddings", False)
    require_flag(written, "bias", False)
    if written.get("sliding_window") is not None and written.get("use_sliding_window") is not False:
        raise written.wrong("sliding_window", "null: a draft's layer sees its whole context")
    config = _with_one_rope(written)
    require_supported(config, (), {})
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    num_heads, hidden_size = config.get("num_attention_heads"), config.get("hidden_size")
    return {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_dim": config.get("head_dim") or hidden_size // num_heads,
        "ffn_size": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
        "max_position": config.get("max_position_embeddings"),
        "norm_eps": float(config.get("rms_norm_eps")),
        "rope_theta": float(theta),
        "rope_scaling": None if rope == {"rope_type": "default"} else rope,
        "token_ids": {key: written.values[key] for key in TOKEN_IDS if key in written.values},
    }


def _with_one_rope(written: JsonFile) -> JsonFile:
    """Where old and new keys say the same rotation, as exporters write them for both, the new."""
    old, new = written.get("rope_scaling"), written.get("rope_parameters")
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return written

    def plain(rope: dict[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
        return {"rope_type": rope.get("type"), **rest}

    if plain(old) != plain(new):
        return written  # which require_supported refuses
    return JsonFile(written.path, {k: v for k, v in written.values.items() if k != "rope_scaling"})


def layer_keys(config: DraftConfig, dtype: str) -> dict[str, Any]:
    """What read_layer reads back; the rotation under the old keys and the new one."""
    scaling = config.rope_scaling
    return {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            **(scaling or {"rope_type": "default"}),
        },
        "max_position_embeddings": config.max_position,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        **{key: config.token_ids.get(key) for key in TOKEN_IDS},
        "attention_bias": False,
    }


def read_sizes(written: JsonFile, vocab_size: int, hidden_size: int) -> dict[str, Any]:
    """draft_vocab_size and target_hidden_size, which both dialects have at the top."""
    if written.get("draft_vocab_size") is None:
        raise written.wrong(
            "draft_vocab_size",
            "the rows of its lm_head; a draft that borrows the target's is not read",
        )
    fits = f"an integer in [1, vocab_size = {vocab_size}]"
    size = written.require("draft_vocab_size", lambda x: is_size(x) and x <= vocab_size, fits)
    target = written.require_if_given("target_hidden_size", is_size, "an integer of at least 1")
    return {"draft_vocab_size": size, "target_hidden_size": target or hidden_size}


def read_flag(written: JsonFile, key: str) -> bool:
    """True or false; false for null or a key that is not there."""
    return bool(written.require_if_given(key, lambda x: type(x) is bool, "true or false"))


def require_flag(written: JsonFile, key: str, value: bool) -> None:
    """ValueError for a key that is there and has the other value, which is not computed here."""
    right = f"{str(value).lower()} or absent: nothing else is computed here"
    written.require_if_given(key, lambda x: x is value, right)


def read_layers(written: JsonFile, key: str) -> tuple[int, ...] | None:
    """The ids under a key; None where there are none."""
    found = written.require_if_given(
        key,
        lambda x: is_list(x) and bool(x) and all(type(i) is int and i >= 0 for i in x),
        "a list of layer ids from 0 on",
    )
    return None if found is None else tuple(found)


def captured_layers(
    written: JsonFile, layers: tuple[int, ...] | None, num_target_layers: int | None
) -> tuple[int, ...]:
    """Those that are given; else EAGLE-3's, in which the dialects agree."""
    if layers is None:
        if num_target_layers is None:
            raise ValueError(
                f"{written.path} says no {LAYER_IDS}; its target's number of layers must be given"
            )
        return default_layers(num_target_layers)
    if num_target_layers is not None:
        require_layers(layers, num_target_layers, f"{written.path}: {LAYER_IDS}, as streams,")
    return layers
