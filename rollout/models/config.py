"""ModelConfig: what the numerics need to know of a Hugging Face config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


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

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def softmax_scale(self) -> float:
        """Factor of q @ k."""
        return self.head_dim**-0.5


def read_hf_config(model_path: Path) -> Any:
    """The transformers config object of a local folder; FileNotFoundError names what is missing."""
    if not model_path.is_dir():
        raise FileNotFoundError(f"model folder {model_path} does not exist")
    if not (model_path / "config.json").exists():
        raise FileNotFoundError(f"model folder {model_path} has no config.json")
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path)


def decoder_config(hf: Any, architecture: str, *, qk_norm: bool) -> ModelConfig:
    """A ModelConfig from a Llama-like config; ValueError names what we cannot compute."""
    _refuse(hf, "hidden_act", {"silu"})
    _refuse(hf, "attention_bias", {False, None})
    _refuse(hf, "mlp_bias", {False, None})
    _refuse(hf, "use_sliding_window", {False, None})
    num_heads = hf.num_attention_heads
    num_kv_heads = hf.num_key_value_heads or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads {num_heads} is no multiple of {num_kv_heads} kv heads"
        )
    rope = dict(hf.rope_parameters or {})
    theta = rope.pop("rope_theta", 10000.0)
    eos = hf.eos_token_id
    return ModelConfig(
        architecture=architecture,
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // num_heads,
        ffn_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        max_position=hf.max_position_embeddings,
        norm_eps=hf.rms_norm_eps,
        rope_theta=float(theta),
        rope_scaling=rope or None,
        qk_norm=qk_norm,
        tie_embeddings=bool(hf.tie_word_embeddings),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _refuse(hf: Any, name: str, supported: set[Any]) -> None:
    value = getattr(hf, name, None)
    if value not in supported and not (value is None and None in supported):
        raise ValueError(f"config.json: {name} = {value!r} is not supported (only {supported})")
