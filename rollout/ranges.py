"""Which sampling parameters may be used: for requests, and for recipes before torch is imported."""

from collections.abc import Callable

RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    # Logits are fp32: what cannot be told from 0 or infinity there is refused.
    "temperature": (lambda x: x == 0 or 1e-6 <= x <= 1e6, "0 or in [1e-6, 1e6]"),
    "top_p": (lambda x: 1e-30 <= x <= 1, "in [1e-30, 1]"),
    "top_k": (lambda x: x >= 0, "not negative (0 keeps all)"),
    "min_p": (lambda x: 0 <= x <= 1, "in [0, 1]"),
}


def require_in_range(name: str, value: float, where: str) -> None:
    """ValueError, which says `where`, unless the parameter of this name may be `value`."""
    fits, meaning = RANGES[name]
    if not fits(value):
        raise ValueError(f"{where} is {value}; it must be {meaning}")
