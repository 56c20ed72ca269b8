"""The modules of Megatron's layers with our operations: the engine's bits through Megatron's own.

Module names stay Megatron's (its gradient sums and checkpoints look for some of them).
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from samebit.kernels.attention_kind import AttentionKind, AttentionPlan
from samebit.kernels.bias import linear_with_bias
from samebit.kernels.rms_norm import rms_norm
from samebit.kernels.rope import rope
from samebit.kernels.swiglu import swiglu
from samebit.trainer.context import ContextShare
from samebit.trainer.megatron.main_grad import main_grad_of
from samebit.trainer.megatron.parallel import gather_context, ranks_of, row_parallel, spread


@dataclass
class ContractConfig(TransformerConfig):
    """Holds Megatron's settings, and ours."""

    tp_invariant: bool = False
    attention: AttentionKind | None = None


@dataclass
class PackedSequences(PackedSeqParams):
    """Holds Megatron's packed-sequence argument, and what our core attention needs."""

    positions: Tensor | None = None
    plan: AttentionPlan | None = None
    share: ContextShare | None = None


class RMSNorm(MegatronModule):
    """kernels.rms_norm over the last dimension: layer norms, and q/k norms per head."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config=config)
        self.eps = eps
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size]."""
        return rms_norm(x, self.weight, self.eps)


class ContractColumnLinear(ColumnParallelLinear):
    """Column-parallel linear: kernels.bias on this rank's rows of the weight and the bias."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, *_unused: Any, **_: Any
    ) -> tuple[Tensor, None]:
        """[s, b, K] ([s / size, b, K] if sequence parallel) -> [s, b, N / size]."""
        x = spread(input_, ranks_of(self.tp_group), self.sequence_parallel)
        weight = self.weight if weight is None else weight
        return linear_with_bias(x, weight, self.bias, main_grad_of(weight)), None


class ContractRowLinear(RowParallelLinear):
    """Row-parallel linear: fp32 partials of kernels.linear, summed in rank order, rounded once."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """[s, b, K / size] -> [s, b, N], or [s / size, b, N] if sequence parallel."""
        ranks = ranks_of(self.tp_group, self.config.tp_invariant)
        return row_parallel(input_, self.weight, ranks, self.sequence_parallel), None


class SwigluMLP(MLP):
    """Megatron's MLP with kernels.swiglu between its two linears."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """[s, b, D] -> [s, b, D]."""
        assert per_token_scale is None
        gate_up, _bias = self.linear_fc1(hidden_states)
        output, _bias = self.linear_fc2(swiglu(gate_up))
        return output, None


class CoreAttention(MegatronModule):
    """Turns by kernels.rope and attends by the configuration's kind, packed sequences only."""

    def __init__(self, config: ContractConfig, *, rope_table: Tensor, **_unused: Any) -> None:
        super().__init__(config=config)
        self.rope_table = rope_table
        assert config.attention is not None
        self.attention = config.attention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSequences | None = None,
        **_unused: Any,
    ) -> Tensor:
        """query [T, Hq, Dh], key and value [T, Hkv, Dh] -> [T, Hq * Dh]; T of this context rank."""
        assert packed_seq_params is not None
        positions, plan = packed_seq_params.positions, packed_seq_params.plan
        assert positions is not None
        assert plan is not None
        q, k = rope(query, positions, self.rope_table), rope(key, positions, self.rope_table)
        k, v = (gather_context(x, packed_seq_params.share) for x in (k, value))
        return self.attention.attend_packed(q, k, v, plan).flatten(1)
