"""Which implementation of a product is the fastest: tables measured offline, one file a card.

`samebit bench kernels --tune` measures and writes them. All implementations give the same bits, so
a table can only change speed. What a card's own table lacks is looked up in those of cards of the
same architecture; what nobody has measured goes by a rule.
"""

import ctypes
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from samebit.kernels.gpu import cublaslt
from samebit.kernels.gpu.card import num_sms, shared_memory
from samebit.kernels.gpu.cublaslt import FIRST, Answer
from samebit.kernels.gpu.skinny import MAX_ROWS, Tile, block_rows

logger = logging.getLogger(__name__)

TABLES = Path(__file__).parent / "tables"
_tables_count = ContextVar("tables count", default=True)


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


def table_name(device_name: str) -> str:
    """The file's name of a card's table."""
    return f"{device_name.lower().replace(' ', '_')}.json"


def user_tables() -> Path:
    """Where the tables lie that were measured on this machine: they count before ours."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "samebit" / "tables"


def _tables_of(device_name: str) -> list[Path]:
    """A card's table files that there are, the one that counts most last."""
    paths = [folder / table_name(device_name) for folder in (TABLES, user_tables())]
    return [path for path in paths if path.exists()]


def to_json(choices: dict[Key, Choice]) -> list[dict[str, Any]]:
    """Rows of a table file."""
    return [
        asdict(key) | ({"tile": asdict(c.tile)} if c.tile else {"cublaslt": asdict(c.cublaslt)})
        for key, c in choices.items()
    ]


def fingerprint(device: torch.device) -> list[str]:
    """What implementations and their choice depend on, beside what the numerics profile holds."""
    name = torch.cuda.get_device_name(device)
    tables = [*sorted(TABLES.glob("*.json")), *_tables_of(name)] if _tables_count.get() else []
    content = b"".join(path.read_bytes() for path in tables)
    driver = ctypes.c_int()  # the newest CUDA that it knows
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
    digest = hashlib.sha256(content).hexdigest()
    return [name, cublaslt.version(), str(driver.value), digest]


def architecture(device: torch.device | int) -> str:
    """What a table says of its card, for others like it: sm_90."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def hint(device: torch.device, shapes: Iterable[tuple[int, int]]) -> str | None:
    """What to tell a user whose card has no table that knows one of these weights [N, K]."""
    name = torch.cuda.get_device_name(device)
    known = {(key.n, key.k) for key in own_choices(name)}
    if not known.isdisjoint(shapes):
        return None
    return (
        f"no product of this model was measured on {name}; which kernel computes it is a guess. "
        "`samebit bench kernels --tune model=FOLDER` measures them, once: that can only change "
        "speed"
    )


def own_choices(device_name: str) -> dict[Key, Choice]:
    """What a card's tables say: of products that they have no row of but measured, the default."""
    found: dict[Key, Choice] = {}
    for path in _tables_of(device_name):
        found |= _choices(path)
    return found


def _choices(path: Path) -> dict[Key, Choice]:
    """What a file says; nothing, and a warning, if it is no table that this version writes."""
    try:
        table, names = json.loads(path.read_text()), [field.name for field in fields(Key)]
        choices = dict.fromkeys(
            (Key(**{n: r[n] for n in names}) for r in table["measured_us"]), DEFAULT
        )
        for row in table["linear"]:
            tile = Tile(**row.pop("tile")) if "tile" in row else None
            answer = Answer(**row.pop("cublaslt", {}))
            choices[Key(**row)] = Choice(tile, answer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            "%s is no tuning table of this version, and not used (%s: %s): `samebit bench kernels "
            "--tune` makes another", path, type(error).__name__, error,
        )  # fmt: skip
        return {}
    return choices


def tiles_of_others(device_name: str, arch: str) -> dict[Key, Choice]:
    """What our tables of other cards of one architecture say: a tile, or that none is best.

    Not which of cuBLASLt's answers is, whose numbers are those of a card's own heuristic.
    """
    found: dict[Key, Choice] = {}
    for path in sorted(TABLES.glob("*.json")):
        if path.name == table_name(device_name):
            continue
        if json.loads(path.read_text()).get("architecture") == arch:
            choices = _choices(path)
            found |= {key: c if c.tile is not None else DEFAULT for key, c in choices.items()}
    return found


def by_rule(key: Key, num_sms: int, shared_bytes: int) -> Choice:
    """A choice for what nobody has measured.

    Few rows: a tile as wide as still gives most SMs a program, with loads in flight for one or two
    programs on each. So were nearly all that were measured. Else cuBLASLt's first answer.
    """
    if key.rows > (32 if key.fp32 else 64):
        return DEFAULT
    widths = (32, 16) if key.gated else (64, 32, 16)
    divides = [width for width in widths if key.n % width == 0]
    full = [width for width in divides if key.n // width >= 0.7 * num_sms]
    if not divides:
        return DEFAULT
    block_n = (full or divides[-1:])[0]
    deep = key.rows <= 32 and block_n <= 32 and not key.gated
    for block_k in (256, 128, 64) if deep else (128, 64):
        programs = 1 if key.n // block_n <= num_sms else 2  # on an SM
        width = block_n * (2 if key.gated else 1) + key.rows
        held = int(shared_bytes * (0.67 if programs == 1 else 0.46))
        stages = min(6, held // (2 * block_k * width))
        if key.k % block_k == 0 and stages >= 3:
            return Choice(Tile(block_n, block_k, 4, stages, prefetch=256 if key.k >= 256 else 0))
    return DEFAULT


@functools.lru_cache(maxsize=8)
def _tables(device_index: int) -> tuple[dict[Key, Choice], dict[Key, Choice]]:
    """The card's own choices, and tiles of cards like it."""
    if not _tables_count.get():
        return {}, {}
    name = torch.cuda.get_device_name(device_index)
    return own_choices(name), tiles_of_others(name, architecture(device_index))


@functools.lru_cache(maxsize=1 << 16)
def choose(device_index: int, key: Key) -> Choice:
    """The choice for a product whose rows are a row_bucket."""
    for table in _tables(device_index):
        if key in table:
            return table[key]
    device = torch.device("cuda", device_index)
    return by_rule(key, num_sms(device), shared_memory(device))


@contextmanager
def without_tables() -> Iterator[None]:
    """In the block there is no table, of this card or of any like it: a rule chooses."""
    token = _tables_count.set(False)
    _forget()
    try:
        yield
    finally:
        _tables_count.reset(token)
        _forget()


def _forget() -> None:
    _tables.cache_clear()
    choose.cache_clear()
