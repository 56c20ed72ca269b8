"""One builder of Megatron's GPTModel, and its forward to log-probs."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from samebit.kernels.attention_kind import AttentionKind
from samebit.kernels.contract import padded_vocab_size
from samebit.kernels.logprob import kept_sets, logprob
from samebit.kernels.top_tokens import reverse_kl
from samebit.kernels.truncation import KeptSets, Thresholds
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.config import ParallelConfig
from samebit.trainer.context import ContextShare
from samebit.trainer.critic.value_model import ValueModel
from samebit.trainer.megatron.main_grad import main_grad_of
from samebit.trainer.megatron.models.registry import parts_of
from samebit.trainer.megatron.parallel import ranks_of, spread
from samebit.trainer.megatron.spec import ContractConfig, PackedSequences
from samebit.trainer.megatron.stages import Stage, stage_specs
from samebit.trainer.megatron.value_head import ValueHead, value_output
from samebit.trainer.types import MicroBatch
from samebit.weight_sync.mapping import unequal_shapes

_RECOMPUTE: Mapping[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def transformer_config(
    model: ModelConfig, attention: AttentionKind, parallel: ParallelConfig, tp_invariant: bool
) -> ContractConfig:
    """Megatron's settings for a model; everything that would change the contract's bits is off."""
    device = attention.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    interleaved = parallel.virtual_pipeline > 1
    return ContractConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        **parts_of(model).settings(model),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        # Both neighbours of a stage of two are one process: what goes to either must not be mixed.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        variable_seq_lengths=parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # asked for by variable lengths, in dense models too
        sequence_parallel=parallel.sequence,
        tp_invariant=tp_invariant,
        attention=attention,
        **_RECOMPUTE[parallel.recompute],
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        batch_p2p_sync=device.type == "cuda",
    )


def build_model(
    model: ModelConfig,
    attention: AttentionKind,
    parallel: ParallelConfig,
    groups: ProcessGroupCollection,
    stage: Stage,
    tp_invariant: bool = False,
    longest: int | None = None,
) -> list[GPTModel]:
    """This process's shard of a GPTModel with our operations and uninitialised weights, by chunk.

    longest: tokens of the longest sample that may come; None: as many as the context holds. Raises
    RuntimeError unless its parameters have the engine's names and shapes.
    """
    # A micro-batch is filled up to a multiple of the tensor ranks by a sequence that nobody reads.
    longest = max(longest or model.max_position, parallel.tensor)
    device, config = attention.device, transformer_config(model, attention, parallel, tp_invariant)
    layers = parts_of(model).layers(model, stage.num_layers, longest, device)
    chunks = [
        GPTModel(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=padded_vocab_size(model.vocab_size),
            max_sequence_length=model.max_position,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="none",
            pre_process=stage.is_first and i == 0,
            post_process=stage.is_last and i == stage.num_chunks - 1,
            pg_collection=groups,
            vp_stage=i if stage.num_chunks > 1 else None,
        )
        for i in range(stage.num_chunks)
    ]
    if isinstance(model, ValueModel) and stage.is_last:
        chunks[-1].output_layer = ValueHead(config, model.hidden_size, groups.tp)
    specs = stage_specs(model, ranks_of(groups.tp).shard, stage)
    if unequal := unequal_shapes(specs, stage.named_params(chunks)):
        raise RuntimeError(f"Megatron's parameters are not the engine's: {sorted(unequal)[:5]}")
    return [chunk.to(device) for chunk in chunks]


def forward_logprobs(
    gpt: Any,
    batch: MicroBatch,
    model: ModelConfig,
    share: ContextShare | None = None,
    entropy_grad: bool = False,
    found: list[KeptSets] | None = None,
) -> Tensor:
    """Log-probs and entropies of the loss rows, [2, R]; entropies carry gradients if asked to. Of
    rows with a teacher's likeliest tokens, the KL to it too, [3, R]. Of a ValueModel they are its
    values, [1, R].

    Given `found`, the kept sets of the rows' thresholds are added to it, and the values mean
    nothing. A stage that is not the last of a pipeline gives the hidden states [T, 1, D] for the
    next one. `gpt` is a GPTModel or Megatron's DDP around one. With a context share, `batch` is the
    share's.
    """
    input_ids, positions, lens = batch.input_ids, batch.positions, list(batch.seq_lens)
    parallel_size = gpt.config.tensor_model_parallel_size
    if gpt.config.sequence_parallel and (pad := -len(input_ids) % parallel_size):
        # Every rank gets as many tokens: a last sequence that nobody looks at.
        input_ids, lens = F.pad(input_ids, (0, pad)), [*lens, pad]
        positions = torch.cat([positions, torch.arange(pad, device=positions.device)])
    packed = PackedSequences(
        qkv_format="thd",
        positions=positions,
        plan=share.plan if share else gpt.config.attention.plan_packed(lens),
        share=share,
    )
    output: dict[str, Any] = {
        "output_processor": _logprob_head,
        "output_processor_context": (batch, model.vocab_size, entropy_grad, found),
    }
    if isinstance(model, ValueModel):
        output = {"output_processor": value_output, "output_processor_context": batch}
    return gpt(input_ids[None], positions[None], None, packed_seq_params=packed, **output)


def _logprob_head(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: tuple[MicroBatch, int, bool, list[KeptSets] | None],
    **_unused: Any,
) -> Tensor:
    """Megatron's output hook: hidden_states [T, 1, D], or this rank's part of T, to [2 or 3, R]."""
    batch, vocab_size, entropy_grad, sets = context
    ranks = ranks_of(output_layer.tp_group)
    whole = spread(hidden_states, ranks, output_layer.config.sequence_parallel)
    hidden = whole.squeeze(1)[batch.rows]
    weight = output_layer.weight if output_weight is None else output_weight
    temperature = torch.full((len(batch.rows),), batch.temperature, device=hidden.device)
    if sets is not None:
        assert isinstance(batch.kept, Thresholds)
        sets.append(kept_sets(hidden, weight, batch.kept, temperature, vocab_size, ranks))
        return hidden.new_zeros(2, len(batch.rows), dtype=torch.float32)
    main_grad, ids = main_grad_of(weight), batch.target_ids
    settings = vocab_size, ranks, main_grad, entropy_grad, batch.kept
    found: tuple[Tensor, ...] = logprob(hidden, weight, ids, temperature, *settings)
    if batch.teacher_top is not None:
        own = temperature, vocab_size, ranks, main_grad
        found = *found, reverse_kl(hidden, weight, batch.teacher_top, *own)
    return torch.stack(found)
