"""The dense pre-norm decoder that Llama, Qwen2 and Qwen3 are: grouped-query attention and SwiGLU.

DenseModel is its configuration, from sizes to parameters by name; Decoder its forward by contract
operations. Parameters carry Megatron's names and row order, so that engine and trainer hold the
same tensors. The forward knows nothing of caches: the caller passes what attends.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from samebit.kernels.attention_kind import AttentionKind, Heads
from samebit.kernels.bias import linear_with_bias
from samebit.kernels.contract import TP_SEGMENTS, padded_vocab_size
from samebit.kernels.logprob import logits
from samebit.kernels.reduce import ALONE, RankGroup, row_parallel_linear, vocab_parallel_embedding
from samebit.kernels.rms_norm import add_rms_norm, rms_norm
from samebit.kernels.rope import rope_table
from samebit.kernels.selfcheck import selfcheck
from samebit.kernels.swiglu import swiglu_linear
from samebit.rollout.models.config import KVLayout, ModelConfig, Product
from samebit.weight_sync.mapping import (
    WHOLE,
    ParamSpec,
    Shard,
    columns,
    grouped_qkv,
    plain,
    stacked,
    vocab,
)

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"

Norms = tuple[Tensor, Tensor] | None  # weights [Dh] of the query and key norms

# (layer, qkv [T, (Hq + 2 Hkv) Dh] by kv head, norms) -> [T, Hq, Dh]
Attend = Callable[[int, Tensor, Norms], Tensor]


@dataclass(frozen=True, kw_only=True)
class DenseModel(ModelConfig):
    """Sizes of a dense decoder, and what follows from them. A family says what it has besides."""

    qk_norm: ClassVar[bool] = False
    """Whether every query and key head is normalised."""
    qkv_bias: ClassVar[bool] = False
    """Whether queries, keys and values have biases."""

    num_heads: int  # Hq
    num_kv_heads: int  # Hkv
    head_dim: int  # Dh
    ffn_size: int  # F
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None

    @classmethod
    def from_hf(cls, hf: Any, eos_token_ids: tuple[int, ...]) -> Self:
        rope = dict(hf.rope_parameters or {})
        theta = rope.pop("rope_theta", 10000.0)
        num_heads = hf.num_attention_heads
        return cls(
            architecture=cls.family.architecture,
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
            tie_embeddings=bool(hf.tie_word_embeddings),
            eos_token_ids=eos_token_ids,
        )

    def attention_heads(self, tp_size: int = 1) -> Heads:
        num_heads, num_kv_heads = self.num_heads // tp_size, self.num_kv_heads // tp_size
        return Heads(num_heads, num_kv_heads, self.head_dim, scale=self.head_dim**-0.5)

    @property
    def kv_layout(self) -> KVLayout:
        return KVLayout(
            num_layers=self.num_layers, num_heads=self.num_kv_heads, head_dim=self.head_dim
        )

    @property
    def layer_products(self) -> Mapping[str, Product]:
        D, F = self.hidden_size, self.ffn_size
        heads = self.num_heads + 2 * self.num_kv_heads
        return {
            "qkv": Product(heads * self.head_dim, D, self.qkv_bias),
            "o": Product(D, self.num_heads * self.head_dim),
            "gate_up": Product(2 * F, D),
            "down": Product(D, F),
        }

    def attention_flops(self, length: int) -> int:
        return 2 * self.num_layers * self.num_heads * self.head_dim * length**2

    def rope_table(self, num_positions: int, device: torch.device) -> Tensor:
        """The angles of the first positions [num_positions, Dh]; never more than the model has."""
        rows = min(num_positions, self.max_position)
        return rope_table(self.head_dim, self.rope_theta, rows, self.rope_scaling, device)

    def make_decoder(
        self, params: Mapping[str, Tensor], num_positions: int, ranks: RankGroup = ALONE
    ) -> "Decoder":
        table = self.rope_table(num_positions, params[EMBEDDING].device)
        return Decoder(self, params, table, ranks)

    def param_specs(self, shard: Shard = WHOLE) -> list[ParamSpec]:
        D = self.hidden_size
        padded, table = padded_vocab_size(self.vocab_size), (self.vocab_size, D)
        specs = [vocab(EMBEDDING, "model.embed_tokens.weight", table, padded, shard)]
        for i in range(self.num_layers):
            specs += self._layer_specs(f"decoder.layers.{i}.", f"model.layers.{i}.", shard)
        specs.append(plain(FINAL_NORM, "model.norm.weight", (D,), shard))
        if not self.tie_embeddings:
            specs.append(vocab(OUTPUT, "lm_head.weight", table, padded, shard))
        return specs

    def _layer_specs(self, to: str, hf: str, shard: Shard) -> Iterator[ParamSpec]:
        D, F, Dh = self.hidden_size, self.ffn_size, self.head_dim
        norm = "input_layernorm.weight"
        yield plain(f"{to}{norm}", f"{hf}{norm}", (D,), shard)
        heads = (self.num_heads, self.num_kv_heads, Dh)
        widths: dict[str, int | None] = {"weight": D}
        if self.qkv_bias:
            widths["bias"] = None
        for part, width in widths.items():
            q, k, v = (f"{hf}self_attn.{x}_proj.{part}" for x in "qkv")
            name = f"{to}self_attention.linear_qkv.{part}"
            yield grouped_qkv(name, (q, k, v), heads, width, shard)
        for x in "qk" if self.qk_norm else "":
            name = f"{to}self_attention.{x}_layernorm.weight"
            yield plain(name, f"{hf}self_attn.{x}_norm.weight", (Dh,), shard)
        proj, o_proj = f"{to}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight"
        yield columns(proj, o_proj, (D, self.num_heads * Dh), shard)
        norm = f"{hf}post_attention_layernorm.weight"
        yield plain(f"{to}pre_mlp_layernorm.weight", norm, (D,), shard)
        gate_up = (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight")
        yield stacked(f"{to}mlp.linear_fc1.weight", gate_up, (F, D), shard)
        yield columns(f"{to}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", (D, F), shard)

    def selfcheck(self, attention: AttentionKind, ranks: RankGroup = ALONE) -> None:
        specs = self.param_specs(ranks.shard)
        matrices = {s.name: (s.shape[0], s.shape[1]) for s in specs if len(s.shape) == 2}
        shapes = set(matrices.values())
        shapes.add((self.vocab_size, self.hidden_size))
        columns_cut, segments = set(), set()
        if ranks.invariant:
            segments = self.segment_shapes(attention.device)
            rows_of = {s.name: s.shape[0] for s in self.param_specs()}
            columns_cut = {(n, k, ranks.size) for s, (n, k) in matrices.items() if n < rows_of[s]}
        widths = (self.head_dim, self.hidden_size, self.ffn_size)
        selfcheck(shapes, attention, widths, columns_cut, segments, [self.vocab_size])

    def segment_shapes(self, device: torch.device) -> set[tuple[int, int]]:
        # Tensor cores take 16 of K at a time.
        step = TP_SEGMENTS * (16 if device.type == "cuda" else 1)
        widths = {
            "num_attention_heads x head_dim": self.num_heads * self.head_dim,
            "intermediate_size": self.ffn_size,
        }
        for name, width in widths.items():
            if width % step:
                raise ValueError(
                    f"{name} is {width}; tp_invariant on '{device.type}' needs a multiple of {step}"
                )
        return {(self.hidden_size, width // TP_SEGMENTS) for width in widths.values()}


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    norms: Norms
    proj: Tensor
    mlp_norm: Tensor
    fc1: Tensor
    fc2: Tensor


def _layer(params: Mapping[str, Tensor], i: int) -> _Layer:
    to = f"decoder.layers.{i}."
    heads = [params.get(f"{to}self_attention.{x}_layernorm.weight") for x in "qk"]
    return _Layer(
        input_norm=params[f"{to}input_layernorm.weight"],
        qkv=params[f"{to}self_attention.linear_qkv.weight"],
        qkv_bias=params.get(f"{to}self_attention.linear_qkv.bias"),
        norms=None if heads[0] is None or heads[1] is None else (heads[0], heads[1]),
        proj=params[f"{to}self_attention.linear_proj.weight"],
        mlp_norm=params[f"{to}pre_mlp_layernorm.weight"],
        fc1=params[f"{to}mlp.linear_fc1.weight"],
        fc2=params[f"{to}mlp.linear_fc2.weight"],
    )


class Decoder:
    """Inference forward over parameters that somebody else owns and may rewrite in place.

    `params` are the shard of `ranks`; heads, features and vocabulary are split over them, and
    every rank gets the whole result. `rope_table` has a row for every position that may come.
    """

    def __init__(
        self,
        config: DenseModel,
        params: Mapping[str, Tensor],
        rope_table: Tensor,
        ranks: RankGroup = ALONE,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.rope_table = rope_table
        self.embedding = params[EMBEDDING]
        self._output_weight = params[EMBEDDING if config.tie_embeddings else OUTPUT]
        self.final_norm = params[FINAL_NORM]
        self.layers = [_layer(params, i) for i in range(config.num_layers)]

    def with_params(self, params: Mapping[str, Tensor]) -> "Decoder":
        return Decoder(self.config, params, self.rope_table, self.ranks)

    def forward(
        self,
        input_ids: Tensor,
        attend: Attend,
        collect: Iterable[int] = (),
        rows: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """input_ids [T] int64 -> (final-normed hidden [T, D], collected).

        `collect` names layers whose residual stream [T, D] to return: i is the stream after i
        layers, 0 the embeddings. `rows` [S] int64: the hidden states wanted, all if None. Behind
        the last attention nothing else is computed, unless streams are collected.
        """
        eps, wanted = self.config.norm_eps, set(collect)
        collected: dict[int, Tensor] = {}
        residual = vocab_parallel_embedding(input_ids, self.embedding, self.ranks)
        branch: Tensor | None = None
        for i, layer in enumerate(self.layers):
            if branch is None:
                normed = rms_norm(residual, layer.input_norm, eps)
            else:
                normed, residual = add_rms_norm(branch, residual, layer.input_norm, eps)
            if i in wanted:
                collected[i] = residual
            qkv = linear_with_bias(normed, layer.qkv, layer.qkv_bias)
            attended = attend(i, qkv, layer.norms)
            if rows is not None and i == len(self.layers) - 1 and not wanted:
                if len(rows) == 0:
                    return residual[:0], collected
                attended, residual, rows = attended[rows], residual[rows], None
            branch = row_parallel_linear(attended.flatten(1), layer.proj, self.ranks)
            normed, residual = add_rms_norm(branch, residual, layer.mlp_norm, eps)
            branch = row_parallel_linear(swiglu_linear(normed, layer.fc1), layer.fc2, self.ranks)
        assert branch is not None
        hidden, residual = add_rms_norm(branch, residual, self.final_norm, eps)
        if len(self.layers) in wanted:
            collected[len(self.layers)] = residual
        return hidden if rows is None else hidden[rows], collected

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] after the final norm -> [S, V] fp32, before any temperature."""
        return logits(hidden, self._output_weight, self.config.vocab_size, self.ranks)
