"""Settings of draft training. Field names are configuration keys; no torch here."""

import math
from dataclasses import dataclass

from samebit.trainer.config import require, require_default

LOSSES = ("ce", "kl", "lk_alpha", "lk_lambda")


@dataclass(kw_only=True)
class TttConfig:
    """The training-time test: how many passes a draft is trained through, and on what."""

    passes: int = 7
    """Draft steps that are unrolled, each on the states of the one before."""
    eval_passes: int = 5
    """Draft steps that an evaluation unrolls, however many train: the guesses of a verification."""
    loss: str = "ce"
    """ce: cross-entropy with the target's probabilities; kl: the same less their entropy;
    lk_alpha: minus the logarithm of the acceptance; lk_lambda: from kl to 1 - acceptance."""
    loss_decay: float = 0.8
    """A pass's loss counts this much less than that of the pass before."""
    lk_decay: float = 3.0
    """Of lk_lambda: kl has the weight exp(-lk_decay x acceptance)."""

    def __post_init__(self) -> None:
        require(self.passes >= 1, "ttt.passes", self.passes, "positive")
        require(self.eval_passes >= 1, "ttt.eval_passes", self.eval_passes, "positive")
        require(self.loss in LOSSES, "ttt.loss", self.loss, f"one of {LOSSES}")
        require(0 < self.loss_decay <= 1, "ttt.loss_decay", self.loss_decay, "in (0, 1]")
        finite = 0 <= self.lk_decay < math.inf
        require(finite, "ttt.lk_decay", self.lk_decay, "finite and at least 0")
        if self.loss != "lk_lambda":
            require_default(self, "ttt", ("lk_decay",), f"ttt.loss is {self.loss!r}")

    def require_enough(self, is_block: bool) -> None:
        """ValueError for a block draft that no pass would have read a mask of."""
        meaning = "at least 2 for a block draft, which reads masks from the second pass on"
        require(self.passes >= 2 or not is_block, "ttt.passes", self.passes, meaning)
