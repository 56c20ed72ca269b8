"""The pre-norm decoder that Llama and Qwen3 share: parameters by name, forward by contract ops.

Parameters carry Megatron's names and row order, so that engine and trainer hold the same tensors.
The model knows nothing of caches: the caller passes what attends.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from samebit.kernels.contract import TP_SEGMENTS, padded_vocab_size
from samebit.kernels.linear import linear
from samebit.kernels.logprob import logits
from samebit.kernels.reduce import (
    ALONE,
    RankGroup,
    row_parallel_linear,
    vocab_parallel_embedding,
)
from samebit.kernels.rms_norm import add_rms_norm, rms_norm
from samebit.kernels.rope import rope_table
from samebit.kernels.selfcheck import selfcheck
from samebit.kernels.swiglu import swiglu_linear
from samebit.rollout.models.config import ModelConfig
from samebit.weight_sync.mapping import (
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

Norms = tuple[torch.Tensor, torch.Tensor] | None  # weights [H] of the query and key norms

# (layer, qkv [T, (N + 2 K) H] by kv head, norms) -> [T, N, H]
Attend = Callable[[int, torch.Tensor, Norms], torch.Tensor]


def param_specs(config: ModelConfig, shard: Shard | None = None) -> list[ParamSpec]:
    """Every parameter of one tensor parallel rank, in forward order."""
    shard = shard or Shard()
    D, H = config.hidden_size, config.head_dim
    padded = padded_vocab_size(config.vocab_size)
    table = (config.vocab_size, D)
    specs = [vocab(EMBEDDING, "model.embed_tokens.weight", table, padded, shard)]
    for i in range(config.num_layers):
        to, hf = f"decoder.layers.{i}.", f"model.layers.{i}."
        norm = "input_layernorm.weight"
        specs.append(plain(f"{to}{norm}", f"{hf}{norm}", (D,), shard.rank))
        q, k, v = (f"{hf}self_attn.{x}_proj.weight" for x in "qkv")
        heads = (config.num_heads, config.num_kv_heads, H)
        specs.append(
            grouped_qkv(f"{to}self_attention.linear_qkv.weight", (q, k, v), heads, D, shard)
        )
        if config.qk_norm:
            for x in "qk":
                name = f"{to}self_attention.{x}_layernorm.weight"
                specs.append(plain(name, f"{hf}self_attn.{x}_norm.weight", (H,), shard.rank))
        proj, o_proj = f"{to}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight"
        specs.append(columns(proj, o_proj, (D, config.num_heads * H), shard))
        norm = f"{hf}post_attention_layernorm.weight"
        specs.append(plain(f"{to}pre_mlp_layernorm.weight", norm, (D,), shard.rank))
        gate_up = (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight")
        specs.append(stacked(f"{to}mlp.linear_fc1.weight", gate_up, (config.ffn_size, D), shard))
        down = (D, config.ffn_size)
        specs.append(
            columns(f"{to}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", down, shard)
        )
    specs.append(plain(FINAL_NORM, "model.norm.weight", (D,), shard.rank))
    if not config.tie_embeddings:
        specs.append(vocab(OUTPUT, "lm_head.weight", table, padded, shard))
    return specs


def rope_table_of(config: ModelConfig, num_positions: int, device: torch.device) -> torch.Tensor:
    """The angles of a model's first positions [num_positions, H]; never more than it has."""
    rows = min(num_positions, config.max_position)
    return rope_table(config.head_dim, config.rope_theta, rows, config.rope_scaling, device)


def selfcheck_model(config: ModelConfig, device: torch.device, ranks: RankGroup = ALONE) -> None:
    """Prove the contract for the shapes of a rank's shard on this machine; see kernels.selfcheck.

    Raises ValueError for a model that tp_invariant cannot cut up.
    """
    specs = param_specs(config, Shard(ranks.rank, ranks.size))
    shapes = {(s.shape[0], s.shape[1]) for s in specs if len(s.shape) == 2}
    shapes.add((config.vocab_size, config.hidden_size))
    columns_cut, segments = set(), set()
    if ranks.invariant:
        segments = segment_shapes(config, device)
        rows_of = {s.name: s.shape[0] for s in param_specs(config)}
        columns_cut = {(*s.shape, ranks.size) for s in specs if s.shape[0] < rows_of[s.name]}
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    widths = (config.head_dim, config.hidden_size, config.ffn_size)
    selfcheck(shapes, heads, widths, device, columns_cut, segments)


def segment_shapes(config: ModelConfig, device: torch.device) -> set[tuple[int, int]]:
    """Of the products that tp_invariant cuts row-parallel weights into.

    Raises ValueError for a width that cannot be cut.
    """
    step = TP_SEGMENTS * (16 if device.type == "cuda" else 1)  # tensor cores take 16 of K at a time
    widths = {
        "num_attention_heads x head_dim": config.num_heads * config.head_dim,
        "intermediate_size": config.ffn_size,
    }
    for name, width in widths.items():
        if width % step:
            raise ValueError(
                f"{name} is {width}; tp_invariant on '{device.type}' needs a multiple of {step}"
            )
    return {(config.hidden_size, width // TP_SEGMENTS) for width in widths.values()}


@dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    norms: Norms
    proj: torch.Tensor
    mlp_norm: torch.Tensor
    fc1: torch.Tensor
    fc2: torch.Tensor


def _layer(params: Mapping[str, torch.Tensor], i: int) -> _Layer:
    to = f"decoder.layers.{i}."
    heads = [params.get(f"{to}self_attention.{x}_layernorm.weight") for x in "qk"]
    return _Layer(
        input_norm=params[f"{to}input_layernorm.weight"],
        qkv=params[f"{to}self_attention.linear_qkv.weight"],
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
        config: ModelConfig,
        params: Mapping[str, torch.Tensor],
        rope_table: torch.Tensor,
        ranks: RankGroup = ALONE,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.rope_table = rope_table
        self.embedding = params[EMBEDDING]
        self._output_weight = params[EMBEDDING if config.tie_embeddings else OUTPUT]
        self.final_norm = params[FINAL_NORM]
        self.layers = [_layer(params, i) for i in range(config.num_layers)]

    def with_params(self, params: Mapping[str, torch.Tensor]) -> "Decoder":
        """The same model over other parameters."""
        return Decoder(self.config, params, self.rope_table, self.ranks)

    def forward(
        self,
        input_ids: torch.Tensor,
        attend: Attend,
        collect: Iterable[int] = (),
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """input_ids [T] int64 -> (final-normed hidden [T, D], collected).

        `collect` names layers whose residual stream [T, D] to return: i is the stream after i
        layers, 0 the embeddings. `rows` [S] int64: the hidden states wanted, all if None. Behind
        the last attention nothing else is computed, unless streams are collected.
        """
        eps, wanted = self.config.norm_eps, set(collect)
        collected: dict[int, torch.Tensor] = {}
        residual = vocab_parallel_embedding(input_ids, self.embedding, self.ranks)
        branch: torch.Tensor | None = None
        for i, layer in enumerate(self.layers):
            if branch is None:
                normed = rms_norm(residual, layer.input_norm, eps)
            else:
                normed, residual = add_rms_norm(branch, residual, layer.input_norm, eps)
            if i in wanted:
                collected[i] = residual
            attended = attend(i, linear(normed, layer.qkv), layer.norms)
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

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, D] after the final norm -> [S, V] fp32, before any temperature."""
        return logits(hidden, self._output_weight, self.config.vocab_size, self.ranks)
