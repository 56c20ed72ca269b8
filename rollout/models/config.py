"""ModelConfig: what the numerics need to know of a Hugging Face config.json."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samebit.rollout.models.json_file import JsonFile
from samebit.rollout.models.stop_tokens import StopTokens, find_stop_tokens
from samebit.rollout.models.supported import require_supported


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a decoder; letters as in kernels/op.py."""

    architecture: str
    num_layers: int
    hidden_size: int  # D
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    ffn_size: int  # F
    vocab_size: int  # V
    max_position: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    qk_norm: bool
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    """What ends a completion: see models/stop_tokens.py."""

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def softmax_scale(self) -> float:
        """Factor of q @ k."""
        return self.head_dim**-0.5

    def require_context(self, num_tokens: int, what: str) -> None:
        """ValueError, which says `what` has so many tokens, unless the model's context holds them.

        Example: require_context(768, "rollout.max_prompt_len + rollout.max_new_tokens")
        """
        if num_tokens > self.max_position:
            raise ValueError(
                f"{what} = {num_tokens} tokens; the model's context (max_position_embeddings of "
                f"its config.json) holds {self.max_position}"
            )


@dataclass(frozen=True)
class Family:
    """What sets one architecture apart."""

    architecture: str
    model_type: str
    qk_norm: bool
    eos_token_id: int | None = None
    """Where a folder says nothing; transformers' default."""
    explicit: Collection[str] = ()
    """Sizes that other families derive, and for which transformers takes a number of its own."""


@dataclass(frozen=True)
class ModelFolder:
    """The configuration of a local Hugging Face folder: as written, and filled by transformers.

    Raises FileNotFoundError for what is missing, ValueError that names file, key and value for what
    cannot be read or is not computed here.
    """

    family: Family
    stop_tokens: StopTokens
    hf: Any

    @classmethod
    def read(cls, path: Path, families: Collection[Family]) -> "ModelFolder":
        """A folder of one of these families."""
        if not path.exists():
            raise FileNotFoundError(
                f"model folder {path} does not exist (nothing is fetched from a hub: give a local "
                "folder)"
            )
        if not path.is_dir():
            raise FileNotFoundError(f"model folder {path} is a file; give the folder that holds it")
        if not (path / "config.json").exists():
            adapter = (path / ADAPTER_FILE).exists()
            hint = f": it is an adapter ({ADAPTER_FILE}), not a model" if adapter else ""
            raise FileNotFoundError(f"model folder {path} has no config.json{hint}")
        require_no_adapter(path)
        written = JsonFile.read(path / "config.json")
        family = _family(written, families)
        require_supported(written, family.explicit)
        stop_tokens = find_stop_tokens(written, family.eos_token_id)
        return cls(family, stop_tokens, _filled(written))

    def model_config(self) -> ModelConfig:
        """What the numerics need."""
        hf = self.hf
        rope = dict(hf.rope_parameters or {})
        theta = rope.pop("rope_theta", 10000.0)
        num_heads = hf.num_attention_heads
        return ModelConfig(
            architecture=self.family.architecture,
            num_layers=hf.num_hidden_layers,
            hidden_size=hf.hidden_size,
            num_heads=num_heads,
            num_kv_heads=hf.num_key_value_heads or num_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // num_heads,
            ffn_size=hf.intermediate_size,
            vocab_size=hf.vocab_size,
            max_position=hf.max_position_embeddings,
            norm_eps=hf.rms_norm_eps,
            rope_theta=float(theta),
            rope_scaling=rope or None,
            qk_norm=self.family.qk_norm,
            tie_embeddings=bool(hf.tie_word_embeddings),
            eos_token_ids=self.stop_tokens.ids,
        )


ADAPTER_FILE = "adapter_config.json"


def require_no_adapter(folder: Path) -> None:
    """ValueError for a folder with an adapter, which transformers would add to the weights."""
    if (folder / ADAPTER_FILE).exists():
        raise ValueError(
            f"{folder / ADAPTER_FILE}: adapters are not supported; merge it into the weights "
            "(peft: merge_and_unload) or take the file away"
        )


def _family(written: JsonFile, families: Collection[Family]) -> Family:
    known = {family.architecture: family for family in families}
    names = written.values.get("architectures", [])
    texts = [n for n in names if isinstance(n, str)] if isinstance(names, list) else []
    found = [known[name] for name in texts if name in known]
    if not found:
        raise ValueError(
            f"{written.path}: architectures = {names}; it must be a list with one of the known: "
            f"{', '.join(sorted(known))}"
        )
    model_type = found[0].model_type
    right = f'"{model_type}", that of {found[0].architecture}'
    written.require("model_type", lambda x: x == model_type, right)
    return found[0]


def _filled(written: JsonFile) -> Any:
    """The transformers config object; its errors name the file."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(written.path.parent, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{written.path}: transformers does not take it: {reason}") from error
