"""Records of .jsonl, .parquet and .arrow files, with their places and numbers' decimal text."""

import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

# Powers of ten of the numbers that a label may be; what is beyond is a mistake.
MOST_DIGITS = 1000


_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of Arrow's


class JsonFloat(Decimal):
    """Keeps a number of a JSON text that is not whole as it stands there."""


@dataclass(frozen=True)
class Record:
    """Holds one record."""

    where: str
    """As in "data.jsonl, line 7"."""
    values: dict[str, Any]
    narrow: tuple[tuple[str, str], ...] = ()
    """Keys of floating-point values narrower than Python's, with their numpy type."""
    columnar: bool = False
    """Its file gives it every field of every column, None where it has none."""

    def number_text(self, value: Any, key: str) -> str | None:
        """Return a number, which stands at `key`, in decimal digits; None for anything else.

        A float gives the fewest digits that mean it.
        """
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            return None
        if isinstance(value, float):
            if not math.isfinite(value):
                return None
            value = Decimal(_shortest(value, dict(self.narrow).get(key)))
        if isinstance(value, Decimal):
            if not value.is_finite() or abs(value.adjusted()) > MOST_DIGITS:
                return None
            return format(value, "f")
        return str(value)


def plain(value: Any) -> Any:
    """Return a value of a record with Python's floats."""
    match value:
        case JsonFloat():
            return float(value)
        case list():
            return [plain(part) for part in value]
        case dict():
            return {key: plain(part) for key, part in value.items()}
    return value


def read_jsonl(path: Path, faults: list[str]) -> Iterator[Record]:
    """Yield the lines of a file but blank ones; what is wrong with one goes to `faults`."""
    decoder = json.JSONDecoder(
        parse_float=_json_float, parse_int=_json_int, object_pairs_hook=_object
    )
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                text = line.decode()
                record = decoder.decode(text)
            except UnicodeDecodeError as error:
                faults.append(f"{where} is not UTF-8: {error.reason} at byte {error.start}")
            except (ValueError, RecursionError) as error:
                faults.append(f"{where} is not JSON: {error}")
            else:
                if isinstance(record, dict):
                    yield Record(where, record)
                else:
                    name = "number" if isinstance(record, JsonFloat) else type(record).__name__
                    faults.append(f"{where} is a JSON {name}; give an object")


def read_parquet(path: Path, faults: list[str]) -> Iterator[Record]:
    """Yield the rows of a file. Raises ValueError, naming the row group, if one cannot be read."""
    import pyarrow.parquet

    part = ""
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _require_distinct(file.schema_arrow.names)
            narrow = tuple(_narrow(file.schema_arrow))
            number = 0
            for group in range(file.num_row_groups):
                part = f", row group {group}"
                for row in file.read_row_group(group).to_pylist():
                    yield Record(f"{path}, row {number}", row, narrow, columnar=True)
                    number += 1
    except Exception as error:  # pyarrow has many, some of them bare OSErrors without a name
        what = " ".join(f"{error}".split())
        raise ValueError(f"{path}{part} is not a readable parquet file: {what:.300}") from error


def read_arrow(path: Path, faults: list[str]) -> Iterator[Record]:
    """Yield the rows of a file in Arrow's stream format, as the package datasets saves them.

    Raises ValueError, naming the record batch, if one cannot be read, and for a file without an
    end: what is cut between two batches would look whole.
    """
    import pyarrow

    part = ""
    try:
        _require_ended(path)
        with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            _require_distinct(stream.schema.names)
            narrow = tuple(_narrow(stream.schema))
            number = 0
            for i in itertools.count():
                part = f", record batch {i}"
                if (batch := next(stream, None)) is None:
                    break
                for row in batch.to_pylist():
                    yield Record(f"{path}, row {number}", row, narrow, columnar=True)
                    number += 1
            if file.tell() != file.size():
                raise ValueError("it holds more than one stream; save them as files of their own")
    except Exception as error:  # as of parquet
        what = " ".join(f"{error}".split())
        raise ValueError(
            f"{path}{part} is not a readable file of Arrow's stream format: {what:.300}"
        ) from error


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet, ".arrow": read_arrow}
"""By the suffix of a file."""


def _require_distinct(names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"it has two columns {twice[0]!r}")


def _require_ended(path: Path) -> None:
    """ValueError unless a stream has its end marker, which every writer of them writes."""
    with path.open("rb") as file:
        if file.read(6) == b"ARROW1":
            raise ValueError("it is in Arrow's file format; save it as a stream, or as .parquet")
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - len(_END), 0))
        if file.read() != _END:
            raise ValueError("its end is missing")


def _shortest(value: float, dtype: str | None) -> str:
    if dtype is None:
        return repr(value)
    import numpy as np

    return str(np.dtype(dtype).type(value))


def _narrow(fields: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of a schema's fields (or a struct's) of 16 or 32 bit floats."""
    from pyarrow import types

    for field in fields:
        name = prefix + field.name
        if types.is_float16(field.type) or types.is_float32(field.type):
            yield name, f"float{field.type.bit_width}"
        elif types.is_struct(field.type):
            yield from _narrow(field.type, f"{name}.")


def _json_float(text: str) -> JsonFloat:
    try:
        return JsonFloat(text)
    except InvalidOperation:
        raise ValueError(f"the number {text:.80} is out of range") from None


def _json_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # so many digits that Python takes long for them
        raise ValueError(f"the number {text:.20}... has {len(text)} digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twice!r} twice")
    return found
