"""The engine's names of Megatron's parameters, for both of its model classes."""

import pytest
import torch

from samebit.rollout.models.registry import load_model_config
from samebit.trainer.megatron.models.adapter import GPT, HYBRID, layer_of

CPU = torch.device("cpu")


def engine_names(model):
    return [spec.name for spec in model.param_specs()]


def hybrid_name(name):
    """As HybridModel's layers *-*-... are called: attention first, then MLP, each a layer."""
    if name.startswith("decoder.final_layernorm."):
        return name.replace("final_layernorm", "final_norm")
    layer = layer_of(name)
    if layer is None:
        return name
    rest = name.removeprefix(f"decoder.layers.{layer}.")
    theirs = 2 * layer + rest.startswith(("pre_mlp_layernorm", "mlp"))
    return f"decoder.layers.{theirs}.{rest}"


def test_gpt_names_are_the_engines(model_path):
    """Counted from the chunk's first layer."""
    for name in engine_names(load_model_config(model_path)):
        assert GPT.engine_name(name, 0) == name
    moved = GPT.engine_name("decoder.layers.1.mlp.linear_fc1.weight", 6)
    assert moved == "decoder.layers.7.mlp.linear_fc1.weight"


def test_hybrid_names_are_those_of_megatrons_own_map(model_path):
    """Megatron reads GPTModel's checkpoints into a HybridModel by it."""
    from megatron.core.dist_checkpointing import gpt_checkpoint_interop as interop

    model = load_model_config(model_path)
    maps = interop.gpt_compatible_layer_maps("*-" * model.num_layers)
    for name in engine_names(model):
        theirs = hybrid_name(name)
        assert HYBRID.engine_name(theirs, 0) == name
        assert interop._retarget_explicit_key_to_gpt_checkpoint(theirs, maps) == name
    moved = HYBRID.engine_name("decoder.layers.3.mlp.linear_fc2.weight", 4)
    assert moved == "decoder.layers.5.mlp.linear_fc2.weight"


@pytest.fixture
def hybrid(model_path, monkeypatch):
    """(model, Megatron's HybridModel of it with our modules); its last norm is ours too, as it
    would else ask for Transformer Engine."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    from samebit.kernels.attention import CanonicalAttention
    from samebit.kernels.contract import padded_vocab_size
    from samebit.trainer.config import ParallelConfig
    from samebit.trainer.megatron.cpu import no_cuda
    from samebit.trainer.megatron.model import transformer_config
    from samebit.trainer.megatron.models import dense
    from samebit.trainer.megatron.setup import process_groups
    from samebit.trainer.megatron.spec import RMSNorm

    monkeypatch.setattr(hybrid_block, "TENorm", RMSNorm)
    model = load_model_config(model_path)
    groups = process_groups(CPU, ParallelConfig())

    def layer(kind, parts):
        return ModuleSpec(module=kind, submodules=TransformerLayerSubmodules(**parts))

    table, attention = model.rope_table(64, CPU), CanonicalAttention(model.attention_heads(), CPU)
    stack = hybrid_block.HybridStackSubmodules(
        attention_layer=layer(TransformerLayer, dense.attention_parts(model, table)),
        mlp_layer=layer(MLPLayer, dense.mlp_parts()),
    )
    with no_cuda():
        gpt = HybridModel(
            config=transformer_config(model, attention, ParallelConfig(), tp_invariant=False),
            hybrid_stack_spec=ModuleSpec(module=hybrid_block.HybridStack, submodules=stack),
            vocab_size=padded_vocab_size(model.vocab_size),
            max_sequence_length=model.max_position,
            hybrid_layer_pattern="*-" * model.num_layers,
            share_embeddings_and_output_weights=model.tie_embeddings,
            pg_collection=groups,
        )
    return model, gpt


def test_a_hybrid_model_holds_the_engines_parameters(hybrid):
    """Megatron's own module, not our idea of it: all names and shapes, none twice."""
    model, gpt = hybrid
    found = [(HYBRID.engine_name(n, 0), tuple(p.shape)) for n, p in gpt.named_parameters()]
    assert sorted(found) == sorted((spec.name, spec.shape) for spec in model.param_specs())
