"""Truncated distributions: softmaxes over the tokens that top-k, top-p and min-p leave alone.

A rule's kept set is all tokens whose scaled logit reaches a threshold (kernels/sample.py), so one
number says it, as long as the weights are those that drew: `Thresholds`. Under others the set is
still what it was, and has to be known itself: `KeptSets`, found once under the weights that drew.
Truncated so, policies before and after an optimizer step share what they may draw (DeepSeek-AI
2025, DeepSeek-V3.2, arXiv 2512.02556, "Keep Sampling Mask").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

_NEVER = float("-inf")


class Kept(Protocol):
    """The tokens of some rows that count."""

    def part(self, rows: slice) -> "Kept":
        """Those of neighbouring rows."""

    def select(self, rows: Tensor) -> "Kept":
        """Those of rows [R] int64."""

    def restrict(self, logits: Tensor, temperature: Tensor, first: int = 0) -> Tensor:
        """logits [T, V] fp32, which may be written, with -inf where a token does not count.

        temperature [T] fp32; the columns are the tokens from `first` on.
        """


@dataclass(frozen=True)
class Thresholds:
    """Kept sets as the smallest scaled logits in them, under the weights that drew."""

    least: Tensor
    """[T] fp32, on the logits' device."""

    def part(self, rows: slice) -> Self:
        """See Kept."""
        return type(self)(self.least[rows])

    def select(self, rows: Tensor) -> Self:
        """See Kept."""
        return type(self)(self.least[rows])

    def restrict(self, logits: Tensor, temperature: Tensor, first: int = 0) -> Tensor:
        """See Kept."""
        return logits.masked_fill_(~self.reached(logits, temperature), _NEVER)

    def reached(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """Mask [T, V] of the kept tokens: the sampler's own comparison."""
        return logits / temperature[:, None] >= self.least[:, None]


@dataclass(frozen=True)
class KeptSets:
    """Kept sets as token ids, on the host: 4 bytes for each token that is kept."""

    counts: Tensor
    """[T] int64, tokens of each set."""
    token_ids: Tensor
    """[sum of counts] int32, set after set, ascending."""

    @classmethod
    def empty(cls, num_rows: int) -> Self:
        """Sets of nothing."""
        return cls(torch.zeros(num_rows, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))

    @classmethod
    def joined(cls, parts: Sequence["KeptSets"]) -> Self:
        """The sets of rows one behind another."""
        counts, token_ids = ([getattr(p, k) for p in parts] for k in ("counts", "token_ids"))
        return cls(torch.cat(counts), torch.cat(token_ids))

    def part(self, rows: slice) -> Self:
        """See Kept."""
        return self.select(torch.arange(len(self.counts))[rows])

    def select(self, rows: Tensor) -> Self:
        """See Kept."""
        rows = rows.cpu()
        counts = self.counts[rows]
        starts, own = (x.cumsum(0) - x for x in (self.counts, counts))
        places = torch.repeat_interleave(starts[rows] - own, counts)
        return type(self)(counts, self.token_ids[places + torch.arange(len(places))])

    def spread(self, rows: Tensor, num_rows: int) -> Self:
        """These sets as those of `rows`, ascending, among num_rows; the other rows keep nothing."""
        counts = self.counts.new_zeros(num_rows)
        counts[rows.cpu()] = self.counts
        return type(self)(counts, self.token_ids)

    def restrict(self, logits: Tensor, temperature: Tensor, first: int = 0) -> Tensor:
        """See Kept."""
        columns = self.token_ids.long() - first
        here = (columns >= 0) & (columns < logits.shape[1])
        rows = torch.repeat_interleave(torch.arange(len(logits)), self.counts)
        where = rows[here].to(logits.device), columns[here].to(logits.device)
        return torch.full_like(logits, _NEVER).index_put_(where, logits[where])


def kept_sets_of(logits: Tensor, temperature: Tensor, thresholds: Thresholds) -> KeptSets:
    """The sets of rows whose logits [T, V] fp32 are those that the thresholds are of."""
    reached = thresholds.reached(logits, temperature)
    return KeptSets(reached.sum(-1).cpu(), reached.nonzero()[:, 1].int().cpu())
