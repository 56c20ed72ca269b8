"""What is wrong with records, told together."""

from collections.abc import Sequence

SHOWN = 5


def raise_faults(faults: Sequence[str]) -> None:
    """Raise ValueError, in one line, if there are any: how many, and the first few."""
    if len(faults) == 1:
        raise ValueError(faults[0])
    if faults:
        rest = len(faults) - SHOWN
        shown = "; ".join([*faults[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])])
        raise ValueError(f"{len(faults)} records cannot be used: {shown}")
