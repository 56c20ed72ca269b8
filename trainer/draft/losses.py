"""Losses of a draft token's distribution q against the target's p, with their gradients.

Each takes log-probs of p and q [c, Vd] in fp32 and gives the loss of each row and its gradient by
the logits of q. Of CE and KL that is q - p. Of the acceptance a = sum of min(p, q), which is 1 less
the total variation distance, it is q (s - sum of q s) with s = 1 where q < p. Sources: Li et al.
2025, arXiv 2503.01840 (ce); LK losses, arXiv 2602.23881. Deviations from SpecForge: the logarithm
of lk_alpha is taken in each row, not of the mean; the weight of lk_lambda is not differentiated.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from samebit.trainer.draft.config import TttConfig

DraftLoss = Callable[[Tensor, Tensor, TttConfig], tuple[Tensor, Tensor]]

_LEAST = 1e-30  # an acceptance that has underflowed: its logarithm stays finite


def acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[c]: the probability that a token drawn from q is accepted for one drawn from p."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def _acceptance_slope(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The acceptance's gradient by the logits of q, [c, Vd]."""
    below = log_q.exp() * (log_q < log_p)
    return below - log_q.exp() * below.sum(-1, keepdim=True)


def _ce(log_p: Tensor, log_q: Tensor, config: TttConfig) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return -(p * log_q).sum(-1), log_q.exp() - p


def _kl(log_p: Tensor, log_q: Tensor, config: TttConfig) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp() - p


def _lk_alpha(log_p: Tensor, log_q: Tensor, config: TttConfig) -> tuple[Tensor, Tensor]:
    accepted = acceptance(log_p, log_q).clamp(min=_LEAST)
    return -accepted.log(), -_acceptance_slope(log_p, log_q) / accepted[:, None]


def _lk_lambda(log_p: Tensor, log_q: Tensor, config: TttConfig) -> tuple[Tensor, Tensor]:
    accepted = acceptance(log_p, log_q)
    weight = torch.exp(-config.lk_decay * accepted)
    kl, slope = _kl(log_p, log_q, config)
    loss = weight * kl + (1 - weight) * (1 - accepted)
    weight = weight[:, None]
    return loss, weight * slope - (1 - weight) * _acceptance_slope(log_p, log_q)


DRAFT_LOSSES: dict[str, DraftLoss] = {
    "ce": _ce,
    "kl": _kl,
    "lk_alpha": _lk_alpha,
    "lk_lambda": _lk_lambda,
}
