"""DraftConfig: an Eagle-3 draft model as a type, for the engine and for its training.

A draft guesses what the target says next. Where the target has computed a token, the residual
streams behind some of its layers are projected to the draft's width (`fc`); one Llama-like layer
takes that and the next token's embedding side by side, and an output layer over the draft
vocabulary, a subset of the target's, says what follows. From then on the layer is fed with what it
gave itself. Source: Li et al. 2025 (EAGLE-3), arXiv 2503.01840; the options `fc_norm` and
`feeds_normed` are EAGLE-3.1, arXiv 2605.09992.

A block draft says several tokens in one pass: behind the last token that is known the layer reads
one mask after another, each the same token beside the same learned streams. Source: P-EAGLE, arXiv
2602.01469; deviations: one layer instead of four, and an embedding that is not trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from samebit.kernels.attention_kind import Heads
from samebit.kernels.contract import padded_vocab_size
from samebit.kernels.rope import rope_table
from samebit.rollout.models.config import KVLayout
from samebit.rollout.models.decoder import DenseModel
from samebit.weight_sync.mapping import (
    ParamSpec,
    columns,
    grouped_qkv,
    plain,
    stacked,
    vocab,
)

FC = "draft.fc.weight"
FC_NORM = "draft.fc_norm.{}.weight"
INPUT_NORM = "draft.input_norm.weight"
MASK = "draft.mask_hidden"
LAYER = "draft.layers.0."
FINAL_NORM = "draft.final_layernorm.weight"
OUTPUT = "draft.output_layer.weight"
EMBEDDING = "draft.embedding.word_embeddings.weight"

HF_LAYER = "midlayer."
HF_EMBEDDING = "embed_tokens.weight"
HF_MASK = "mask_hidden"


@dataclass(frozen=True)
class Verifier:
    """The target, as the speculators dialect names it."""

    name_or_path: str
    architectures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """A draft's sizes and options. Raises ValueError that names what does not fit together."""

    hidden_size: int  # D
    target_hidden_size: int  # Dt
    captured_layers: tuple[int, ...]
    """Whose residual streams are fused, in this order: i is the target's stream after i layers, as
    in Request.hidden_state_layers."""
    num_heads: int  # Hq
    num_kv_heads: int  # Hkv
    head_dim: int  # Dh
    ffn_size: int  # F
    vocab_size: int  # V, the target's
    draft_vocab_size: int  # Vd
    max_position: int
    norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    owns_embedding: bool = False
    """Whether it has an embedding [V, D] of its own; the target's is shared otherwise."""
    fc_norm: bool = False
    """Normalise each captured stream by itself before `fc`."""
    norm_before_fc: bool = False
    """Normalise the captured streams as one vector before `fc`."""
    norm_before_residual: bool = False
    """Add the layer's branches to its normalised input; to the input itself otherwise."""
    feeds_normed: bool = False
    """Feed the next draft step with the state after the final norm; before it otherwise."""
    mask_token_id: int | None = None
    """Of a block draft: the target's token whose embedding a mask has."""
    token_ids: dict[str, Any] = field(default_factory=dict)
    """pad_token_id, bos_token_id and eos_token_id, those that config.json has."""
    verifier: Verifier | None = None
    speculative_tokens: int = 3
    """Tokens that the speculators dialect proposes to draft at a time."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.type is int:
                value = getattr(self, f.name)
                self._require(type(value) is int and value >= 1, f.name, "an integer of at least 1")
        layers = self.captured_layers
        self._require(bool(layers) and min(layers) >= 0, "captured_layers", "layers from 0 on")
        multiple = f"a multiple of num_kv_heads = {self.num_kv_heads}"
        self._require(self.num_heads % self.num_kv_heads == 0, "num_heads", multiple)
        self._require(self.head_dim % 2 == 0, "head_dim", "even, as rope turns pairs")
        fits = self.draft_vocab_size <= self.vocab_size
        self._require(fits, "draft_vocab_size", f"at most vocab_size = {self.vocab_size}")
        mask, fits = self.mask_token_id, True
        if mask is not None:
            fits = type(mask) is int and 0 <= mask < self.vocab_size
        self._require(fits, "mask_token_id", f"in [0, vocab_size = {self.vocab_size})")
        feeds = self.feeds_normed and mask is not None
        self._require(not feeds, "feeds_normed", "false with mask_token_id: no state is fed back")
        both = self.fc_norm and self.norm_before_fc
        self._require(not both, "fc_norm", "false where norm_before_fc is set")
        shares = self.owns_embedding or self.hidden_size == self.target_hidden_size
        what = f"true ({HF_EMBEDDING}), as the target's embedding has another width"
        self._require(shares, "owns_embedding", what)

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise ValueError(f"the draft's {name} is {getattr(self, name)!r}; it must be {what}")

    @classmethod
    def of_target(
        cls,
        target: DenseModel,
        draft_vocab_size: int,
        captured_layers: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Self:
        """A new draft with the target's sizes and rotation; `options` are other fields.

        captured_layers: EAGLE-3's if None. Raises ValueError for a target of too few layers for
        those, and for layers that it does not have.
        """
        layers = captured_layers or default_layers(target.num_layers)
        require_layers(layers, target.num_layers, "captured_layers")
        sizes = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size")
        same = (*sizes, "max_position", "norm_eps", "rope_theta", "rope_scaling")
        given = {name: getattr(target, name) for name in same}
        if given["rope_scaling"] == {"rope_type": "default"}:
            given["rope_scaling"] = None  # the same to us; SpecForge knows no scaling of that name
        given |= {"target_hidden_size": target.hidden_size, "captured_layers": tuple(layers)}
        given |= {"token_ids": {"eos_token_id": list(target.eos_token_ids) or None}}
        return cls(**given | {"draft_vocab_size": draft_vocab_size} | options)

    @property
    def is_block(self) -> bool:
        """Whether it says all tokens in one pass, behind masks."""
        return self.mask_token_id is not None

    @property
    def num_features(self) -> int:
        """Elements of the captured streams of one token."""
        return len(self.captured_layers) * self.target_hidden_size

    @property
    def num_matmul_weights(self) -> int:
        """Weights that multiply every row of a pass: its layer's and its output layer's. `fc` is
        taken once for each token that the target has computed."""
        D, Dh = self.hidden_size, self.head_dim
        attention = 2 * D * (self.num_heads + 2 * self.num_kv_heads) * Dh + self.num_heads * Dh * D
        return attention + 3 * D * self.ffn_size + self.draft_vocab_size * D

    @property
    def attention_heads(self) -> Heads:
        """What attention is made for."""
        return Heads(self.num_heads, self.num_kv_heads, self.head_dim, scale=self.head_dim**-0.5)

    @property
    def kv_layout(self) -> KVLayout:
        """What its layer keeps of every token."""
        return KVLayout(num_layers=1, num_heads=self.num_kv_heads, head_dim=self.head_dim)

    def rope_table(self, num_positions: int, device: torch.device) -> Tensor:
        """The angles of the first positions, [num_positions, Dh] fp32."""
        return rope_table(self.head_dim, self.rope_theta, num_positions, self.rope_scaling, device)

    def param_specs(self, replica: bool = False) -> list[ParamSpec]:
        """Every parameter, whole, from Hugging Face tensors by the names of the SGLang dialect.

        replica: of a tensor parallel rank behind the first one, which holds the same.
        """
        D, n = self.hidden_size, len(self.captured_layers)
        specs = [plain(FC, "fc.weight", (D, self.num_features))]
        for i in range(n) if self.fc_norm else ():
            name = f"fc_norm.{i}.weight"
            specs.append(plain(FC_NORM.format(i), name, (self.target_hidden_size,)))
        if self.norm_before_fc:
            specs.append(plain(INPUT_NORM, "input_norm.weight", (self.num_features,)))
        if self.is_block:
            specs.append(plain(MASK, HF_MASK, (self.num_features,)))
        specs += self._layer_specs()
        specs.append(plain(FINAL_NORM, "norm.weight", (D,)))
        Vd = self.draft_vocab_size
        specs.append(vocab(OUTPUT, "lm_head.weight", (Vd, D), padded_vocab_size(Vd)))
        if self.owns_embedding:
            V = self.vocab_size
            specs.append(vocab(EMBEDDING, HF_EMBEDDING, (V, D), padded_vocab_size(V)))
        return [replace(spec, replica=replica) for spec in specs]

    def _layer_specs(self) -> Iterator[ParamSpec]:
        D, F, Dh, hf = self.hidden_size, self.ffn_size, self.head_dim, HF_LAYER
        for name in ("input_layernorm.weight", "hidden_norm.weight"):
            yield plain(f"{LAYER}{name}", f"{hf}{name}", (D,))
        q, k, v = (f"{hf}self_attn.{x}_proj.weight" for x in "qkv")
        heads = (self.num_heads, self.num_kv_heads, Dh)
        yield grouped_qkv(f"{LAYER}self_attention.linear_qkv.weight", (q, k, v), heads, 2 * D)
        proj, o_proj = f"{LAYER}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight"
        yield columns(proj, o_proj, (D, self.num_heads * Dh))
        norm = f"{hf}post_attention_layernorm.weight"
        yield plain(f"{LAYER}pre_mlp_layernorm.weight", norm, (D,))
        gate_up = (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight")
        yield stacked(f"{LAYER}mlp.linear_fc1.weight", gate_up, (F, D))
        yield columns(f"{LAYER}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", (D, F))


def default_layers(num_target_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's choice: the target's streams after 2, N // 2 and N - 3 of its N layers.

    Raises ValueError where these are not three layers in ascending order.
    """
    found = (2, num_target_layers // 2, num_target_layers - 3)
    if not found[0] < found[1] < found[2]:
        raise ValueError(
            f"a target of {num_target_layers} layers has no default captured_layers (2, N // 2, "
            "N - 3); give some"
        )
    return found


def require_layers(layers: tuple[int, ...], num_target_layers: int, key: str) -> None:
    """ValueError, naming the key, for streams that the target does not have."""
    if not all(0 <= layer <= num_target_layers for layer in layers):
        raise ValueError(
            f"{key} is {list(layers)}; the target has streams after 0 to {num_target_layers} layers"
        )
