"""Settings of the trainer; field names are configuration keys under `trainer`."""

from dataclasses import dataclass, field

from samebit.trainer.algorithms.base import LOSS_MEANS

LR_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6
    min_lr: float = 0.0
    """Learning rate at the end of a decaying schedule."""
    lr_schedule: str = "constant"
    """constant, linear or cosine."""
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        if self.lr < 0 or self.min_lr < 0 or self.min_lr > self.lr:
            raise ValueError(f"optimizer: need 0 <= min_lr ({self.min_lr}) <= lr ({self.lr})")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(
                f"optimizer.lr_schedule is '{self.lr_schedule}'; use one of {LR_SCHEDULES}"
            )
        if self.clip_grad < 0:
            raise ValueError(f"optimizer.clip_grad is {self.clip_grad}; it must not be negative")


@dataclass(kw_only=True)
class TrainerConfig:
    """How samples become optimizer steps."""

    micro_batch_tokens: int = 8192
    """Most tokens packed into one forward and backward."""
    loss_mean: str = "token"
    """token: every token counts the same; sequence: every sample counts the same."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.micro_batch_tokens < 1:
            raise ValueError(
                f"trainer.micro_batch_tokens is {self.micro_batch_tokens}; it must be positive"
            )
        if self.loss_mean not in LOSS_MEANS:
            raise ValueError(f"trainer.loss_mean is '{self.loss_mean}'; use one of {LOSS_MEANS}")
