"""What the trainer works on. Per-token fields are marked [L] (one sample) or [R] (loss rows)."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt with one response. Made by recipes from completions, used by packing.

    Example: Sample(sample_id=3, token_ids=(1, 7, 9, 2), prompt_len=2, logprobs=(-0.5, -0.1),
    advantage=1.2)
    """

    sample_id: int
    token_ids: tuple[int, ...]
    """[L] prompt and response."""
    prompt_len: int
    logprobs: tuple[float, ...] = ()
    """[L - prompt_len] the rollout's log-probs; empty for supervised samples."""
    advantage: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_len < len(self.token_ids):
            raise ValueError(
                f"sample {self.sample_id}: prompt_len {self.prompt_len} must leave at least one of "
                f"{len(self.token_ids)} tokens as response"
            )
        if self.logprobs and len(self.logprobs) != self.response_len:
            raise ValueError(
                f"sample {self.sample_id}: {len(self.logprobs)} logprobs for a response of "
                f"{self.response_len} tokens"
            )

    @property
    def response_len(self) -> int:
        """Tokens that carry loss."""
        return len(self.token_ids) - self.prompt_len


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples packed one behind another. A loss row is a position whose next token is trained."""

    index: int
    samples: tuple[Sample, ...]
    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, within each sample
    seq_lens: tuple[int, ...]
    rows: torch.Tensor  # [R] int64, places among the T tokens
    target_ids: torch.Tensor  # [R] int64
    sample_of_row: torch.Tensor  # [R] int64, index into samples
    rollout_logprobs: torch.Tensor | None  # [R] fp32
    advantages: torch.Tensor  # [R] fp32
    loss_weights: torch.Tensor  # [R] fp32: 1, or 1 / response_len for the mean over samples
    loss_denominator: int  # this micro-batch's share of what the summed loss is divided by
    temperature: float

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """One optimizer step, summed over its micro-batches."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    logprob_tokens_compared: int
    logprob_mismatches: int
    logprob_abs_diff_max: float
    metrics: dict[str, float] = field(default_factory=dict)
    """Means over loss rows."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; nothing was written to the weights."""
