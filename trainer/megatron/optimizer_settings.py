"""Our settings of the optimizer as Megatron's."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from samebit.trainer.config import OptimizerConfig, ParallelConfig


def make_optimizer(
    chunks: Sequence[Any],
    config: OptimizerConfig,
    parallel: ParallelConfig,
    groups: ProcessGroupCollection,
) -> Any:
    """Megatron's AdamW of DDPs whose layout has these groups."""
    bf16 = chunks[0].config.bf16
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    options: Any = {"use_gloo_process_groups": False, "pg_collection": groups}
    return get_megatron_optimizer(settings, list(chunks), **options)


def lr_scheduler(
    optimizer: Any, config: OptimizerConfig, num_steps: int
) -> OptimizerParamScheduler:
    """Megatron's schedule of learning rates, in optimizer steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=max(num_steps, config.lr_warmup_steps + 1),
        lr_decay_style=config.lr_schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=max(num_steps, 1),
        wd_incr_style="constant",
    )
