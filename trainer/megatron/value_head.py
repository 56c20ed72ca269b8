"""The critic's output layer in Megatron: one number for each loss row."""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from samebit.kernels.reduce import RankGroup, gather_rows, own_rows
from samebit.trainer.megatron.parallel import ranks_of
from samebit.trainer.types import MicroBatch


class ValueHead(MegatronModule):
    """Stands in the place of Megatron's output layer. Products and their sum are in fp32, so that
    values of thousands of tokens do not fall on the few numbers that bf16 has between 0 and 1."""

    def __init__(self, config: TransformerConfig, hidden_size: int, tp_group: Any) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R] fp32."""
        return (hidden.float() * self.weight.float()).sum(-1)


class _Gather(torch.autograd.Function):
    """The rows of all sequence parallel ranks, of which each computes the same; backward: its own
    rows of the gradient that all have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: RankGroup) -> Tensor:
        ctx.ranks = ranks
        return gather_rows(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return own_rows(grad, ctx.ranks), None


def value_output(
    *, hidden_states: Tensor, output_layer: ValueHead, context: MicroBatch, **_unused: Any
) -> Tensor:
    """Megatron's output hook: hidden_states [T, 1, D], or this rank's part of T, to [1, R]."""
    ranks = ranks_of(output_layer.tp_group)
    if output_layer.config.sequence_parallel:
        hidden_states = _Gather.apply(hidden_states, ranks)
    return output_layer(hidden_states.squeeze(1)[context.rows])[None]
