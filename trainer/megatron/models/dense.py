"""Dense models in Megatron: its settings for them, and the layers of one chunk."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from samebit.rollout.models.decoder import DenseModel
from samebit.trainer.megatron.spec import (
    ContractColumnLinear,
    ContractRowLinear,
    CoreAttention,
    RMSNorm,
    SwigluMLP,
)


def settings(model: DenseModel) -> dict[str, Any]:
    """Megatron's names for a dense model's sizes and parts."""
    return {
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn_size,
        "layernorm_epsilon": model.norm_eps,
        "qk_layernorm": model.qk_norm,
        "add_qkv_bias": model.qkv_bias,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
    }


def attention_parts(model: DenseModel, rope_table: Tensor) -> dict[str, Any]:
    """The first half of a layer, by the names of Megatron's."""
    norm = RMSNorm if model.qk_norm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ContractColumnLinear,
            core_attention=partial(CoreAttention, rope_table=rope_table),
            linear_proj=ContractRowLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    return {
        "input_layernorm": RMSNorm,
        "self_attention": attention,
        "self_attn_bda": get_bias_dropout_add,
    }


def mlp_parts() -> dict[str, Any]:
    """The other half."""
    mlp = MLPSubmodules(linear_fc1=ContractColumnLinear, linear_fc2=ContractRowLinear)
    return {
        "pre_mlp_layernorm": RMSNorm,
        "mlp": partial(SwigluMLP.as_mlp_submodule, submodules=mlp),
        "mlp_bda": get_bias_dropout_add,
    }


def layers(
    model: DenseModel, num_layers: int, longest: int, device: torch.device
) -> TransformerBlockSubmodules:
    """The decoder layers of one chunk, for samples of at most `longest` tokens."""
    parts = attention_parts(model, model.rope_table(longest, device)) | mlp_parts()
    layer = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**parts))
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
