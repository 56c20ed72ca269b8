"""A JSON file of a model folder, whose keys are checked as they are read."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JsonFile:
    """The keys of a JSON object. What is wrong with one raises ValueError, which names it."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "JsonFile":
        """A file that must exist; ValueError unless it holds one JSON object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # of the encoding as well
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {_shown(values)}; it must be a JSON object of keys")
        return cls(path, values)

    @classmethod
    def read_if_there(cls, path: Path) -> "JsonFile":
        """`read`, or no keys at all where there is no such file."""
        return cls.read(path) if path.exists() else cls(path, {})

    def get(self, key: str) -> Any:
        """Its value; None for null or a key that is not there."""
        return self.values.get(key)

    def wrong(self, key: str, right: str) -> ValueError:
        """The error to raise: what the key is, and what it must be."""
        if key not in self.values:
            return ValueError(f"{self.path} has no {key}; it must be {right}")
        return ValueError(f"{self.path}: {key} is {_shown(self.values[key])}; it must be {right}")

    def require(self, key: str, is_right: Callable[[Any], bool], right: str) -> Any:
        """The value of a key that must be there."""
        if key not in self.values or not is_right(self.values[key]):
            raise self.wrong(key, right)
        return self.values[key]

    def require_if_given(self, key: str, is_right: Callable[[Any], bool], right: str) -> Any:
        """The value of a key; None for null or a key that is not there."""
        return None if self.get(key) is None else self.require(key, is_right, right)


def is_size(value: Any) -> bool:
    """An integer of at least 1; true and 4.0 are none."""
    return type(value) is int and value >= 1


def is_positive(value: Any) -> bool:
    """A finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def _shown(value: Any) -> str:
    """As JSON writes it, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
