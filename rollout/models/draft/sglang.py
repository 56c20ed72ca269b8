"""config.json in the dialect of EAGLE, SGLang, SpecForge and ModelOpt.

Layer ids in `eagle_config` name layers by whose *output* is captured: id k is the stream after
k + 1 layers. `norm_output` is refused unless somebody says whose it is: SGLang feeds the next
step with the normalised state where it is true, SpecForge applies the norm before the output layer,
and feeds the state before it all the same.
"""

from typing import Any

from samebit.rollout.models.draft.config import HF_LAYER, DraftConfig
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
from samebit.rollout.models.json_file import JsonFile

LAYER = HF_LAYER  # our own names are this dialect's
NORM_OUTPUT = ("sglang", "specforge")
"""Whose meaning `norm_output` may have."""
ARCHITECTURE = "LlamaForCausalLMEagle3"
_ARCHITECTURES = (ARCHITECTURE, "LlamaForCausalLM")  # EAGLE's own say the second
_FIXED = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
}


def read(
    written: JsonFile, owns_embedding: bool, num_target_layers: int | None, norm_output: str | None
) -> DraftConfig:
    """The draft that a config.json describes. norm_output: whose meaning that key has, if known.

    Raises ValueError that names the key for what is wrong, ambiguous or not computed here.
    """
    require_eagle3(written)
    names = written.values.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and names[0] in _ARCHITECTURES):
        raise written.wrong("architectures", f"a list of one of {', '.join(_ARCHITECTURES)}")
    if written.get(LAYER_IDS) is not None:
        raise ValueError(
            f"{written.path}: {LAYER_IDS} stands at the top, where some count inputs of layers and "
            "some outputs; put it into eagle_config, counted by outputs"
        )
    layer = read_layer(written)
    require_flag(written, "norm_before_residual", False)
    return DraftConfig(
        **layer,
        **read_sizes(written, layer["vocab_size"], layer["hidden_size"]),
        captured_layers=_captured(written, num_target_layers),
        owns_embedding=owns_embedding,
        fc_norm=read_flag(written, "fc_norm"),
        norm_before_fc=read_flag(written, "norm_before_fc"),
        feeds_normed=_feeds_normed(written, norm_output),
    )


def _captured(written: JsonFile, num_target_layers: int | None) -> tuple[int, ...]:
    given = written.require_if_given("eagle_config", lambda x: isinstance(x, dict), "an object")
    inner = JsonFile(written.path, {f"eagle_config.{k}": v for k, v in (given or {}).items()})
    known = [f"eagle_config.{key}" for key in (LAYER_IDS, *_FIXED)]
    for key in inner.values:
        if key not in known:
            raise ValueError(f"{written.path}: {key} is unknown; known are {', '.join(known)}")
    for key, value in _FIXED.items():
        require_flag(inner, f"eagle_config.{key}", value)
    ids = read_layers(inner, f"eagle_config.{LAYER_IDS}")
    return captured_layers(written, ids and tuple(i + 1 for i in ids), num_target_layers)


def _feeds_normed(written: JsonFile, meaning: str | None) -> bool:
    if written.get("norm_output") is None:
        return False
    value = read_flag(written, "norm_output")
    if meaning == "sglang":
        return value
    if meaning == "specforge":
        require_flag(written, "norm_output", True)
        return False
    raise ValueError(
        f"{written.path}: norm_output is {str(value).lower()}, which is ambiguous: SGLang and vLLM "
        "feed the normalised state back where it is true, SpecForge only normalises before lm_head;"
        f" say whose it is (norm_output: {' or '.join(NORM_OUTPUT)})"
    )


def write(config: DraftConfig, dtype: str) -> dict[str, Any]:
    """The keys of config.json; norm_output, where it is there, means SGLang's.

    Raises ValueError for what the dialect cannot say.
    """
    if config.is_block:
        raise ValueError("the sglang dialect has no block drafts; write speculators'")
    if config.norm_before_residual:
        raise ValueError("the sglang dialect has no norm_before_residual; write speculators'")
    if 0 in config.captured_layers:
        raise ValueError("the sglang dialect counts outputs of layers: it has no embeddings (0)")
    flags = {
        "fc_norm": config.fc_norm,
        "norm_before_fc": config.norm_before_fc,
        "norm_output": config.feeds_normed,
    }
    width = config.target_hidden_size
    own_width = {"target_hidden_size": width} if width != config.hidden_size else {}
    return {
        "architectures": [ARCHITECTURE],
        **layer_keys(config, dtype),
        "draft_vocab_size": config.draft_vocab_size,
        **own_width,
        **{key: True for key, value in flags.items() if value},
        "eagle_config": {LAYER_IDS: [layer - 1 for layer in config.captured_layers], **_FIXED},
    }
