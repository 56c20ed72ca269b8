"""Other engines' figures, from a file that says where each one comes from.

The file is a JSON list; every entry names all of this, in the words that are then printed:

    [{"engine": "...", "version": "...", "card": "NVIDIA H200", "date": "2026-01-31",
      "command": "...", "model": "qwen3-8b", "workloads": {"64x8x512x512": 16877}}]

card is the device's whole name, model that of the model's folder; workloads, in the benchmark's own
notation, have output tokens per second.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from samebit.recipes.bench.config import Workload
from samebit.trainer.config import require


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Holds one engine's figures on one card."""

    engine: str
    version: str
    card: str
    date: str
    command: str
    model: str
    workloads: dict[str, float]

    @property
    def label(self) -> str:
        """The peer's column is called this."""
        return f"{self.engine} {self.version}"


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0  # type: ignore


def _entry(entry: Any, where: str) -> Peer:
    known = [f.name for f in fields(Peer)]
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no object with {', '.join(known)}")
    if missing := [name for name in known if name not in entry]:
        raise ValueError(f"{where} does not name its {', '.join(missing)}")
    if unknown := sorted(entry.keys() - set(known)):
        raise ValueError(f"{where} has {', '.join(unknown)}; it may have {', '.join(known)}")
    for name in known[:-1]:
        is_text = isinstance(entry[name], str) and entry[name].strip() != ""
        require(is_text, f"{where}: {name}", entry[name], "text")
    rates = entry["workloads"]
    if not isinstance(rates, dict) or not rates:
        raise ValueError(f"{where}: workloads is {rates!r}; it must give tokens per second by name")
    for text, rate in rates.items():
        try:
            Workload.parse(text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        require(_number(rate), f"{where}: {text}", rate, "tokens per second")
    return Peer(**entry)


def load_peers(path: str) -> list[Peer]:
    """The entries of a file. Raises ValueError that names the file, the entry and the field, and
    OSError if the file cannot be read."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"peers: {error}") from error
    except ValueError as error:
        raise ValueError(f"peers: {path} is no JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"peers: {path} must hold a list of entries, at least one")
    found = [_entry(entry, f"peers: entry {i} of {path}") for i, entry in enumerate(entries, 1)]
    seen: dict[tuple[str, ...], int] = {}
    for i, peer in enumerate(found, 1):
        key = (peer.label, peer.card, peer.model)
        if key in seen:
            raise ValueError(
                f"peers: entries {seen[key]} and {i} of {path} are both {peer.label} on "
                f"{peer.card} with {peer.model}"
            )
        seen[key] = i
    return found


def comparable(peers: list[Peer], card: str, model: str, workloads: list[str]) -> list[Peer]:
    """Return those of the same card and model, with some of these workloads."""
    same = [peer for peer in peers if (peer.card, peer.model) == (card, model)]
    return [peer for peer in same if not peer.workloads.keys().isdisjoint(workloads)]
