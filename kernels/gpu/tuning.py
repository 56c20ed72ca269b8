"""Which implementation of a product is the fastest: tables measured offline, one file a card.

`samebit bench kernels --tune` measures and writes them. All implementations give the same bits, so
a table can only change speed. Shapes and cards without a table take cuBLASLt's first answer.
"""

import ctypes
import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from samebit.kernels.gpu import cublaslt
from samebit.kernels.gpu.cublaslt import FIRST, Answer
from samebit.kernels.gpu.skinny import MAX_ROWS, Tile, block_rows

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Key:
    """A product: y [rows, n] = x @ weight.T over k; gated: swiglu of a weight of 2n rows."""

    n: int
    k: int
    rows: int
    gated: bool = False
    fp32: bool = False


@dataclass(frozen=True)
class Choice:
    """The streaming kernel with this tile, or this answer of cuBLASLt's."""

    tile: Tile | None = None
    cublaslt: Answer = FIRST


DEFAULT = Choice()


def row_bucket(num_rows: int) -> int:
    """Row counts that share an entry: those of one tile height; above, each its own."""
    return block_rows(num_rows) if num_rows <= MAX_ROWS else num_rows


def table_path(device_name: str) -> Path:
    """The file of a card."""
    return TABLES / f"{device_name.lower().replace(' ', '_')}.json"


def to_json(choices: dict[Key, Choice]) -> list[dict[str, Any]]:
    """Rows of a table file."""
    return [
        asdict(key) | ({"tile": asdict(c.tile)} if c.tile else {"cublaslt": asdict(c.cublaslt)})
        for key, c in choices.items()
    ]


def fingerprint(device: torch.device) -> list[str]:
    """What implementations and their choice depend on, beside what the numerics profile holds."""
    name = torch.cuda.get_device_name(device)
    table = table_path(name)
    digest = hashlib.sha256(table.read_bytes()).hexdigest() if table.exists() else "none"
    driver = ctypes.c_int()  # the newest CUDA that it knows
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
    return [name, cublaslt.version(), str(driver.value), digest]


@functools.lru_cache(maxsize=8)
def _table(device_index: int) -> dict[Key, Choice]:
    path = table_path(torch.cuda.get_device_name(device_index))
    if not path.exists():
        return {}
    choices = {}
    for row in json.loads(path.read_text())["linear"]:
        tile = Tile(**row.pop("tile")) if "tile" in row else None
        answer = Answer(**row.pop("cublaslt", {}))
        choices[Key(**row)] = Choice(tile, answer)
    return choices


@functools.lru_cache(maxsize=1 << 16)
def choose(device_index: int, key: Key) -> Choice:
    """The choice for a product whose rows are a row_bucket."""
    return _table(device_index).get(key, DEFAULT)
