"""What the numerics contract leaves open, as a section of the configuration. No torch here."""

from dataclasses import dataclass

from samebit.kernels.registry import ATTENTION_KINDS
from samebit.trainer.config import (
    ParallelConfig,
    check_grad_segments,
    check_tp_invariant,
    require,
)


@dataclass(kw_only=True)
class AttentionSection:
    """Chooses the attention of engine and trainer alike; the numerics profile names it."""

    attention: str = "canonical"
    """canonical; flashinfer, on a GPU; or module:Class, a kind of your own."""

    def __post_init__(self) -> None:
        kinds, name = tuple(ATTENTION_KINDS), self.attention
        meaning = f"one of {kinds} or your own module:Class"
        require(name in kinds or ":" in name, "numerics.attention", name, meaning)


@dataclass(kw_only=True)
class NumericsSection(AttentionSection):
    """Chooses what the contract leaves open; see kernels/profile.py and docs/contract.md."""

    tp_invariant: bool = False
    """A forward's bits do not depend on trainer.parallel.tensor, which may be 1, 2, 4 or 8."""
    grad_segments: int = 0
    """Sum gradients by so many fixed parts of an optimizer step's samples, a power of two, so that
    weights do not depend on trainer.parallel.data, which may be 1, 2, 4, ... up to it; 0: off."""

    def check(self, parallel: ParallelConfig) -> None:
        """Raise ValueError for a layout that does not go with what is chosen."""
        check_tp_invariant(self.tp_invariant, parallel.tensor, f"{parallel.key}.tensor")
        check_grad_segments(self.grad_segments, parallel)

    def copies_to_fill(self, parallel: ParallelConfig) -> int:
        """Return how many copies of the model need samples of their own at a time.

        With segments one may have none: they do not go by the copies.
        """
        return 1 if self.grad_segments else parallel.data
