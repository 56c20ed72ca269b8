"""What users pass, brought to plain Python values; what does not fit is a ValueError by name.

No torch here, and no numpy: `samebit --help` answers at once.
"""

import operator
from dataclasses import fields
from types import NoneType
from typing import Any, get_args

MAX_UINT64 = (1 << 64) - 1
_TEXTS = (str, bytes, bytearray)


def integer_of(value: Any) -> int | None:
    """The value of an integer of some type, numpy's and torch's too; True and 1.0 are none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def as_integer(value: Any, what: str) -> int:
    """An integer, see integer_of."""
    integer = integer_of(value)
    if integer is None:
        raise ValueError(f"{what} is {shown(value)}; it must be an integer")
    return integer


def as_number(value: Any, what: str) -> float:
    """A real number of some type; texts and arrays of several are none."""
    try:
        if getattr(value, "ndim", 0) or isinstance(value, _TEXTS) or _is_flag(value):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} is {shown(value)}; it must be a number") from None


def as_flag(value: Any, what: str) -> bool:
    """True or False, numpy's too, or 1 or 0."""
    if (isinstance(value, int) or _is_flag(value)) and value in (0, 1):
        return bool(value)
    raise ValueError(f"{what} is {shown(value)}; it must be True or False")


def _is_flag(value: Any) -> bool:
    """Whether it is True or False, numpy's too."""
    numpys = str(getattr(value, "dtype", "")) == "bool" and not getattr(value, "ndim", 0)
    return isinstance(value, bool) or numpys


def bring_to_type(settings: Any, where: str) -> None:
    """The numbers and flags of a dataclass, of other types such as numpy's, become Python's."""
    convert = {int: as_integer, float: as_number, bool: as_flag}
    for f in fields(settings):
        value, kinds = getattr(settings, f.name), get_args(f.type)
        optional = NoneType in kinds
        kind = kinds[0] if optional else f.type
        if kind in convert and not (optional and value is None):
            object.__setattr__(settings, f.name, convert[kind](value, f"{where}.{f.name}"))


def as_list(value: Any, what: str, right: str, ordered: bool = True) -> list[Any]:
    """The items of a list, a tuple or an array (or of a set, unless ordered), not of a text."""
    if type(value) is list or type(value) is tuple:
        return list(value)
    needed = ("__iter__", "__len__", "__getitem__") if ordered else ("__iter__",)
    strange = isinstance(value, _TEXTS) or hasattr(value, "keys")
    try:
        if strange or not all(hasattr(value, name) for name in needed):
            raise TypeError
        return list(value)
    except TypeError:  # also an array of no dimensions
        raise ValueError(f"{what} is {shown(value)}; it must be {right}") from None


def shown(value: Any) -> str:
    """In one line, cut short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."
