"""Means that a loss may be: what each loss row weighs, and what the weighted sum is divided by.

A mean is a pure function of which tokens are trained on. Another one is a function here and its
line in LOSS_MEANS, whose names are those of trainer.loss_mean. No torch here.
"""

from collections.abc import Callable

import numpy as np

LossMean = Callable[[np.ndarray, np.ndarray, int | None], tuple[np.ndarray, int]]
"""(loss rows of each sample of a micro-batch [B], each row's sample [R], loss_mean_tokens) -> (each
row's weight [R] fp32, denominator). The loss of an optimizer step is the sum over its micro-batches
of row losses times weights, divided by the sum of their denominators."""


def token(
    row_counts: np.ndarray, sample_of_row: np.ndarray, tokens: int | None
) -> tuple[np.ndarray, int]:
    """Every token counts the same."""
    return np.ones(len(sample_of_row), np.float32), len(sample_of_row)


def sequence(
    row_counts: np.ndarray, sample_of_row: np.ndarray, tokens: int | None
) -> tuple[np.ndarray, int]:
    """Every sample counts the same, as the mean over its tokens."""
    return (np.float32(1) / row_counts.astype(np.float32))[sample_of_row], len(row_counts)


def constant(
    row_counts: np.ndarray, sample_of_row: np.ndarray, tokens: int | None
) -> tuple[np.ndarray, int]:
    """The mean over samples of their sums, divided by a constant (Dr. GRPO, arXiv 2503.20783)."""
    assert tokens is not None
    return np.full(len(sample_of_row), np.float32(1) / np.float32(tokens)), len(row_counts)


LOSS_MEANS: dict[str, LossMean] = {"token": token, "sequence": sequence, "constant": constant}
