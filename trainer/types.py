"""What the trainer works on. Per-token fields are marked [L] (one sample) or [R] (loss rows)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from torch import Tensor

from samebit.kernels.top_tokens import TopTokens
from samebit.kernels.truncation import Kept
from samebit.weight_sync.types import VersionSpan

_FLOATS = ("logprobs", "thresholds", "ref_logprobs", "teacher_logprobs", "values", "returns",
           "advantages")  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Tokens in a row, and for each of them whether and how it is trained on.

    Made by recipes from completions, used by packing. A prompt with its response is `of_response`;
    a conversation masks what the policy has not drawn, such as a tool's output between two turns.
    Fields [L] may be given as any sequence. Raises ValueError unless they are of one length, some
    token is trained on, and the first, which nothing predicts, is not.

    Example: Sample(sample_id=3, token_ids=(1, 7, 9, 2), loss_mask=(0, 0, 1, 1),
    logprobs=(0, 0, -0.5, -0.1), advantages=1.2)
    """

    sample_id: int
    token_ids: np.ndarray
    """[L] int64."""
    loss_mask: np.ndarray
    """[L] bool: whether the token is trained on."""
    logprobs: np.ndarray | None = None
    """[L] fp32: the rollout's, read where the mask is set; None for supervised samples."""
    thresholds: np.ndarray | None = None
    """[L] fp32: what could be drawn, as in Completion, where the log-probs are truncated."""
    ref_logprobs: np.ndarray | None = None
    """[L] fp32: the reference model's, where rewards are lowered by the KL to it."""
    teacher_logprobs: np.ndarray | None = None
    """[L] fp32: a teacher's, read where the mask is set."""
    teacher_top: TopTokens | None = None
    """[tokens trained on], on the host: a teacher's likeliest tokens in the place of each."""
    values: np.ndarray | None = None
    """[L] fp32: the critic's, of the state before each token, read where the mask is set."""
    returns: np.ndarray | None = None
    """[L] fp32: what the critic is to learn there."""
    advantages: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))
    """[L] fp32, read where the mask is set; one number is that of every token."""
    version_spans: tuple[VersionSpan, ...] = ()
    """Which weight version drew the tokens from which place in token_ids on; empty if none did."""
    unit: int | None = None
    """Neighbours of one unit stay in one micro-batch, where a loss of pairs needs both."""

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        dtypes = {"token_ids": np.int64, "loss_mask": np.bool_}
        for name, dtype in (dtypes | dict.fromkeys(_FLOATS, np.float32)).items():
            if (given := getattr(self, name)) is None:
                continue
            values: np.ndarray = np.asarray(given, dtype)
            if name in ("token_ids", "loss_mask") and (values != given).any():
                kind = "integers" if name == "token_ids" else "0 or 1"
                raise ValueError(f"sample {self.sample_id}: {name} must hold {kind}")
            if name == "advantages" and values.ndim == 0:
                values = np.broadcast_to(values, length)
            if values.shape != (length,):
                raise ValueError(
                    f"sample {self.sample_id}: {name} of shape {values.shape} for {length} tokens"
                )
            object.__setattr__(self, name, values)
        top = self.teacher_top
        if top is not None and len(top.rest) != self.num_trained:
            raise ValueError(
                f"sample {self.sample_id}: teacher_top of {len(top.rest)} places for "
                f"{self.num_trained} tokens that are trained on"
            )
        if not self.loss_mask.any() or self.loss_mask[0]:
            raise ValueError(
                f"sample {self.sample_id}: loss_mask must be set for some of {length} tokens and "
                "not for the first, which nothing predicts"
            )

    @classmethod
    def of_response(
        cls,
        *,
        sample_id: int,
        token_ids: Sequence[int],
        prompt_len: int,
        logprobs: Sequence[float] = (),
        thresholds: Sequence[float] = (),
        advantage: float = 0.0,
        version_spans: Sequence[VersionSpan] = (),
        unit: int | None = None,
    ) -> Self:
        """One prompt with one response, all of which is trained on.

        token_ids [L] are both; logprobs [L - prompt_len] (empty: a supervised sample), thresholds
        (empty: log-probs of the full softmax) and the places of version_spans are the response's.
        """
        length = len(token_ids)
        if not 1 <= prompt_len < length:
            raise ValueError(
                f"sample {sample_id}: prompt_len {prompt_len} must leave at least one of "
                f"{length} tokens as response"
            )
        sample = cls(
            sample_id=sample_id,
            token_ids=np.asarray(token_ids, np.int64),
            loss_mask=np.arange(length) >= prompt_len,
            advantages=np.asarray(advantage, np.float32),
            version_spans=tuple(replace(s, start=prompt_len + s.start) for s in version_spans),
            unit=unit,
        )
        if thresholds:
            sample = replace(sample, thresholds=sample.in_place(thresholds, "thresholds"))
        return sample.with_logprobs(logprobs) if logprobs else sample

    def with_logprobs(self, logprobs: Sequence[float]) -> Self:
        """The sample with these log-probs [tokens trained on] as the rollout's.

        Raises ValueError for another number of them.
        """
        return replace(self, logprobs=self.in_place(logprobs, "logprobs"))

    def in_place(self, values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
        """Values of the tokens trained on, where those stand: [L] fp32, else 0.

        Raises ValueError, which says what they are by `name`, for another number of them.
        """
        if len(values) != self.num_trained:
            raise ValueError(
                f"sample {self.sample_id}: {len(values)} {name} for a response of "
                f"{self.num_trained} tokens"
            )
        found = np.zeros(len(self.token_ids), np.float32)
        found[self.loss_mask] = values
        return found

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.loss_mask))

    @property
    def has_one_version(self) -> bool:
        """Whether no two weight versions drew it, so that the trainer can compute its log-probs."""
        return len({span.version for span in self.version_spans}) <= 1

    @property
    def comparable_from(self) -> int:
        """From this place on the newest weights that drew give the rollout's log-probs: they have
        computed all that stands before. The sample's length if they have not."""
        if self.has_one_version:
            return 0
        newest = self.version_spans[-1]
        return newest.start if newest.recomputed else len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples packed one behind another. A loss row is a position whose next token is trained.

    A context rank's share holds its own tokens and rows, and the samples of all.
    """

    index: int
    samples: tuple[Sample, ...]
    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, within each sample
    seq_lens: tuple[int, ...]
    rows: Tensor  # [R] int64, places among the T tokens, in ascending order
    target_ids: Tensor  # [R] int64
    sample_of_row: Tensor  # [R] int64, index into samples
    row_counts: Tensor  # [B] int64, loss rows of each sample, those of other ranks included
    rollout_logprobs: Tensor | None  # [R] fp32
    is_compared: Tensor  # [R] bool: whether the log-prob must be the rollout's
    advantages: Tensor  # [R] fp32
    loss_weights: Tensor  # [R] fp32, by the mean that the loss is (trainer/loss_means.py)
    loss_denominator: int  # this micro-batch's share of what the summed loss is divided by
    temperature: float
    segment: int = 0
    """Which of the optimizer step's gradient segments it belongs to, if there are any."""
    kept: Kept | None = None
    """[R] which tokens the rows' distributions are of; None: all."""
    teacher_top: TopTokens | None = None
    """[R] a teacher's likeliest tokens."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return len(self.input_ids)


Mismatch = tuple[int, int, float, float]
"""A log-prob with other bits than the rollout's: its sample's id, its token's place in the sample,
the rollout's value and the trainer's."""


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
    first_mismatch: Mismatch | None = None
    """That of the lowest sample id and place."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means over loss rows."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; nothing was written to the weights."""
