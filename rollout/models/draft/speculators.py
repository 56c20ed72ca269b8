"""config.json in the dialect of speculators, which vLLM reads.

Layer ids at the top name layers by whose *input* is captured: id k is the stream after k layers, as
ours. `norm_output` means the state that is fed back. `norm_before_residual` must be there: without
it speculators takes false and vLLM true.
"""

from typing import Any

from samebit.rollout.models.draft.config import DraftConfig, Verifier
from samebit.rollout.models.draft.layer_json import (
    LAYER_IDS,
    captured_layers,
    layer_keys,
    read_flag,
    read_layer,
    read_layers,
    read_sizes,
    require_eagle3,
    require_flag,
)
from samebit.rollout.models.json_file import JsonFile, is_list, is_size

LAYER = "layers.0."
TYPE_KEY = "speculators_model_type"
VERSION = "0.9.0"
_CHAIN, _BLOCK = "eagle3", "peagle"
_ARCHITECTURES = {
    _CHAIN: ("Eagle3DraftModel", "Eagle3Speculator"),
    _BLOCK: ("PEagleDraftModel", "PEagleSpeculator"),
}
"""By the draft's type: ours, and another that is read."""
_MASK = "mask_token_id"
_LAYER = "transformer_layer_config"
_PROPOSAL = "speculators_config.proposal_methods"


def read(
    written: JsonFile, owns_embedding: bool, num_target_layers: int | None, norm_output: str | None
) -> DraftConfig:
    """The draft that a config.json describes. norm_output: as in sglang.read; here its meaning is
    plain, and None must be given.

    Raises ValueError that names the key for what is wrong, ambiguous or not computed here.
    """
    if norm_output is not None:
        raise ValueError(f"{written.path} is speculators', whose norm_output needs no explanation")
    known = " or ".join(f'"{name}"' for name in _ARCHITECTURES)
    kind = written.require(TYPE_KEY, _ARCHITECTURES.__contains__, f"{known}: no other is read")
    require_eagle3(written, but=(_MASK,) if kind == _BLOCK else ())
    names, of_kind = written.values.get("architectures"), _ARCHITECTURES[kind]
    if not (isinstance(names, list) and len(names) == 1 and names[0] in of_kind):
        raise written.wrong("architectures", f"a list of one of {', '.join(of_kind)}")
    if written.get("eagle_config") is not None:
        raise ValueError(f"{written.path}: eagle_config is of the sglang dialect; take it away")
    require_flag(written, "tie_word_embeddings", False)
    keys = written.require(_LAYER, lambda x: isinstance(x, dict), "an object, the layer's keys")
    inner = JsonFile(written.path.with_name(f"{written.path.name}: {_LAYER}"), keys)
    layer = read_layer(inner)
    both = "true or false: where it is absent speculators takes false, and vLLM true"
    return DraftConfig(
        **layer,
        **read_sizes(written, layer["vocab_size"], layer["hidden_size"]),
        captured_layers=captured_layers(
            written, read_layers(written, LAYER_IDS), num_target_layers
        ),
        owns_embedding=owns_embedding,
        fc_norm=read_flag(written, "fc_norm"),
        norm_before_fc=read_flag(written, "norm_before_fc"),
        norm_before_residual=written.require(
            "norm_before_residual", lambda x: type(x) is bool, both
        ),
        feeds_normed=read_flag(written, "norm_output"),
        mask_token_id=_mask_of(written, layer["vocab_size"]) if kind == _BLOCK else None,
        **_proposal(written, kind),
    )


def _mask_of(written: JsonFile, vocab_size: int) -> int:
    fits = f"a token's id, in [0, vocab_size = {vocab_size})"
    found: int = written.require(_MASK, lambda x: type(x) is int and 0 <= x < vocab_size, fits)
    return found


def _proposal(written: JsonFile, kind: str) -> dict[str, Any]:
    """The verifier and the number of tokens; nothing that the forward depends on."""
    said = written.require("speculators_config", lambda x: isinstance(x, dict), "an object")
    inner = JsonFile(written.path, {f"speculators_config.{k}": v for k, v in said.items()})
    inner.require("speculators_config.algorithm", lambda x: x == kind, f'"{kind}"')
    verifier = inner.require("speculators_config.verifier", _is_verifier, "a name_or_path (a text) "
                             "and architectures (a list)")  # fmt: skip
    methods = inner.require(_PROPOSAL, _are_methods, "a list of one with speculative_tokens")
    return {
        "verifier": Verifier(verifier["name_or_path"], tuple(verifier["architectures"])),
        "speculative_tokens": methods[0]["speculative_tokens"],
    }


def _is_verifier(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("name_or_path"), str):
        return False
    names = value.get("architectures")
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _are_methods(value: Any) -> bool:
    if not (is_list(value) and len(value) == 1 and isinstance(value[0], dict)):
        return False
    return is_size(value[0].get("speculative_tokens"))


def write(config: DraftConfig, dtype: str) -> dict[str, Any]:
    """The keys of config.json; ValueError for a draft that does not say its verifier."""
    if config.verifier is None:
        raise ValueError("the speculators dialect names the target; the draft has no verifier")
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": config.speculative_tokens,
        "accept_tolerance": 0.0,
        "verifier_accept_k": 1,
    }
    kind = _BLOCK if config.is_block else _CHAIN
    return {
        "architectures": [_ARCHITECTURES[kind][0]],
        TYPE_KEY: kind,
        **({_MASK: config.mask_token_id} if config.is_block else {}),
        "speculators_version": VERSION,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.feeds_normed,
        "embed_requires_grad": False,
        LAYER_IDS: list(config.captured_layers),
        "tie_word_embeddings": False,
        _LAYER: layer_keys(config, dtype),
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {
                "name_or_path": config.verifier.name_or_path,
                "architectures": list(config.verifier.architectures),
            },
        },
    }
