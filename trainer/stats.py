"""Sums over a step's micro-batches, and the comparison of trainer and rollout log-probs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from samebit.trainer.types import MicroBatch, Mismatch, Sample, StepStats


@dataclass(frozen=True)
class Comparison:
    """What comes of comparing a rollout's log-probs with the trainer's, bit for bit."""

    tokens: int = 0
    mismatches: int = 0
    abs_diff_max: float = 0.0
    first: Mismatch | None = None

    @classmethod
    def of(cls, batch: MicroBatch, logprobs: Tensor) -> Self:
        """Compare those rows [R] fp32 of one micro-batch of which the batch says that they are to
        be the rollout's; a context rank may have none."""
        assert batch.rollout_logprobs is not None
        rows = batch.is_compared.nonzero()[:, 0]

        def named(i: int) -> tuple[int, int]:
            sample = batch.samples[int(batch.sample_of_row[rows[i]])].sample_id
            return sample, int(batch.positions[batch.rows[rows[i]]]) + 1  # which the row predicts

        return cls._of(logprobs[rows], batch.rollout_logprobs[rows], named)

    @classmethod
    def of_sample(cls, sample: Sample, places: Tensor, logprobs: Tensor) -> Self:
        """Compare the log-probs [N] fp32 of a sample's tokens at these places [N] int64 in it with
        those that it was drawn with."""
        assert sample.logprobs is not None
        drawn = torch.from_numpy(sample.logprobs)[places]
        return cls._of(logprobs, drawn, lambda i: (sample.sample_id, int(places[i])))

    @classmethod
    def _of(cls, ours: Tensor, drawn: Tensor, named: Callable[[int], tuple[int, int]]) -> Self:
        """Compare [N] fp32; named: the sample id and the place in it of one of them."""
        if not len(ours):
            return cls()
        diff, first = float((ours - drawn).abs().max()), None
        if count := count_mismatches(ours, drawn):
            i = int((ours.view(torch.int32) != drawn.view(torch.int32)).nonzero()[0])
            first = *named(i), float(drawn[i]), float(ours[i])
        return cls(len(ours), count, diff, first)

    @classmethod
    def in_step(cls, stats: StepStats) -> "Comparison":
        """Return that which an optimizer step has made of its own forward pass."""
        return cls(
            stats.logprob_tokens_compared,
            stats.logprob_mismatches,
            stats.logprob_abs_diff_max,
            stats.first_mismatch,
        )

    def __add__(self, other: "Comparison") -> "Comparison":
        """Return that of the tokens of both."""
        return Comparison(
            self.tokens + other.tokens,
            self.mismatches + other.mismatches,
            max(self.abs_diff_max, other.abs_diff_max),
            first_of(self.first, other.first),
        )

    @property
    def fault(self) -> str:
        """What is wrong, with the first token that differs; empty if none does."""
        if self.first is None:
            return ""
        sample, place, drawn, trained = self.first
        return (
            f"{self.mismatches} of {self.tokens} log-probs differ between rollout and trainer (at "
            f"most by {self.abs_diff_max}), first that of sample {sample:#x}, token {place}: "
            f"{drawn} drawn, {trained} trained"
        )


def first_of(*mismatches: Mismatch | None) -> Mismatch | None:
    """Return the one of the lowest sample id and place; of no mismatches None."""
    return min(filter(None, mismatches), default=None, key=lambda found: found[:2])


@dataclass
class Totals:
    """Accumulates in micro-batch order."""

    loss: float = 0.0
    denominator: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    compared: int = 0
    mismatches: int = 0
    abs_diff_max: float = 0.0
    first_mismatch: Mismatch | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def add(
        self, batch: MicroBatch, logprobs: Tensor, loss: Tensor, metrics: dict[str, Tensor]
    ) -> None:
        """Add a micro-batch: logprobs [R], its summed loss and metrics [R] by name."""
        self.loss += float(loss)
        self.denominator += batch.loss_denominator
        self.num_tokens += batch.num_tokens
        self.num_rows += len(logprobs)
        for name, values in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + float(values.double().sum())
        if batch.rollout_logprobs is None:
            return
        found = Comparison.of(batch, logprobs)
        self.compared += found.tokens
        self.mismatches += found.mismatches
        self.abs_diff_max = max(self.abs_diff_max, found.abs_diff_max)
        self.first_mismatch = first_of(self.first_mismatch, found.first)

    def merge(self, others: Iterable["Totals"]) -> None:
        """Add what other ranks have summed up, in their order."""
        for other in others:
            for name in ("loss", "denominator", "num_tokens", "num_rows", "compared", "mismatches"):
                setattr(self, name, getattr(self, name) + getattr(other, name))
            self.abs_diff_max = max(self.abs_diff_max, other.abs_diff_max)
            self.first_mismatch = first_of(self.first_mismatch, other.first_mismatch)
            for name, value in other.metrics.items():
                self.metrics[name] = self.metrics.get(name, 0.0) + value

    def stats(self, grad_norm: float, learning_rate: float) -> StepStats:
        """The step's figures."""
        return StepStats(
            loss=self.loss / self.denominator,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=self.num_tokens,
            logprob_tokens_compared=self.compared,
            logprob_mismatches=self.mismatches,
            logprob_abs_diff_max=self.abs_diff_max,
            first_mismatch=self.first_mismatch,
            metrics={name: value / self.num_rows for name, value in self.metrics.items()},
        )


def merged(ranks: Iterable[Mapping[int, Mapping[str, Any]]], num_segments: int = 1) -> Totals:
    """The totals of a step from the fields of each rank's by gradient segment.

    Those of a segment are added in the ranks' order, the segments' as their gradients are: by a
    binary tree, neighbours first. So the figures do not depend on which ranks had which segments.
    """
    sums: dict[int, Totals] = {}
    for segments in ranks:
        for segment, fields in segments.items():
            found = Totals(**{**fields, "metrics": dict(fields["metrics"])})
            if segment in sums:
                sums[segment].merge([found])
            else:
                sums[segment] = found
    tree = [sums.get(segment, Totals()) for segment in range(num_segments)]
    while len(tree) > 1:
        for left, right in zip(tree[::2], tree[1::2], strict=True):
            left.merge([right])
        tree = tree[::2]
    return tree[0]


def count_mismatches(a: Tensor, b: Tensor) -> int:
    """How many fp32 values differ in any bit (so NaN equals itself, and 0.0 differs from -0.0)."""
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())
