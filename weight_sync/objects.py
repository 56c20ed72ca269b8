"""What processes tell each other: plain values, as bytes and back to the bit.

Plain are None, bool, int, float, str, bytes, list, tuple, dict, array.array of numbers, and tensors
in the CPU's memory. To decode runs nothing that the bytes name, as a pickle would: at worst it
raises ValueError. All machines have one byte order.
"""

import struct
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from samebit.weight_sync.meeting import meeting_device

_DTYPES = {
    str(dtype): dtype
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    + (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
# Of the items of a list or tuple: in one piece if all are of one of these types.
_ARRAYS: dict[type, str] = {int: "q", float: "d"}
_NUMBERS = "bBhHiIlLqQfd"
_CONSTANTS: dict[bytes, Any] = {b"N": None, b"T": True, b"F": False}


def encode(value: Any) -> bytes:
    """The value's bytes. Raises TypeError for another type, also for a subclass of these."""
    return b"".join(_encoded(value))


def decode(data: bytes) -> Any:
    """The value that was encoded. Raises ValueError for anything else."""
    reader = _Reader(data)
    try:
        value = reader.value()
    except (struct.error, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"damaged message: {error}") from None
    if reader.place != len(data):
        raise ValueError(f"damaged message: {len(data) - reader.place} bytes too many")
    return value


def gather_objects[T](value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every process's plain value, in rank order (of all processes, or of a group).

    Without torch.distributed there is one value. Raises TypeError for one that is not plain.
    """
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    if size == 1:
        return [value]
    device = meeting_device(group)
    data = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8)
    length = torch.tensor([len(data)], device=device)
    lengths = [int(n) for n in _gather(length, size, group)]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(data)] = data
    parts = zip(_gather(padded.to(device), size, group), lengths, strict=True)
    return [decode(part[:n].cpu().numpy().tobytes()) for part, n in parts]


def smallest(value: int, group: dist.ProcessGroup | None) -> int:
    """The least of the values of a group's processes; no group: this process is alone."""
    return value if group is None else min(gather_objects(value, group))


def _gather(x: torch.Tensor, size: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x, group=group)
    return parts


def _sized(tag: bytes, content: bytes) -> bytes:
    return tag + struct.pack("<q", len(content)) + content


def _encoded(value: Any) -> Iterator[bytes]:
    kind = type(value)
    if value is None or kind is bool:
        yield b"N" if value is None else b"T" if value else b"F"
    elif kind is int:
        yield _sized(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    elif kind is float:
        yield b"f" + struct.pack("<d", value)
    elif kind is str:
        yield _sized(b"s", value.encode("utf-8", "surrogatepass"))
    elif kind is bytes:
        yield _sized(b"b", value)
    elif kind is array and value.typecode in _NUMBERS:
        yield _sized(b"r" + value.typecode.encode(), value.tobytes())
    elif kind is list or kind is tuple:
        yield from _encoded_items(value, b"l" if kind is list else b"t")
    elif kind is dict:
        yield b"m" + struct.pack("<q", len(value))
        for pair in value.items():
            yield from (part for item in pair for part in _encoded(item))
    elif isinstance(value, torch.Tensor) and value.device.type == "cpu":
        yield b"a"
        yield from _encoded((str(value.dtype), tuple(value.shape)))
        flat = value.detach().contiguous().view(-1)
        yield _sized(b"b", flat.view(torch.uint8).numpy().tobytes())
    else:
        where = f" on {value.device}" if isinstance(value, torch.Tensor) else ""
        raise TypeError(f"{kind.__module__}.{kind.__qualname__}{where} is no plain value")


def _encoded_items(value: list[Any] | tuple[Any, ...], tag: bytes) -> Iterator[bytes]:
    kinds = set(map(type, value))
    code = _ARRAYS.get(kinds.pop()) if len(kinds) == 1 else None
    if code is not None:
        try:
            yield _sized(tag + code.encode(), array(code, value).tobytes())
            return
        except OverflowError:  # an integer of more than 64 bits
            pass
    yield tag + b"*" + struct.pack("<q", len(value))
    for item in value:
        yield from _encoded(item)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.place = 0

    def _take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self._data) - self.place:
            raise ValueError("damaged message: it ends too early")
        self.place += count
        return self._data[self.place - count : self.place]

    def _tag(self) -> bytes:
        return bytes(self._take(1))

    def _length(self) -> int:
        return struct.unpack("<q", self._take(8))[0]

    def value(self) -> Any:
        tag = self._tag()
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag == b"f":
            return struct.unpack("<d", self._take(8))[0]
        if tag in (b"l", b"t"):
            items = self._items()
            return list(items) if tag == b"l" else tuple(items)
        if tag == b"r":
            return self._array(str(self._tag(), "ascii"))
        if tag == b"m":
            return {self.value(): self.value() for _ in range(self._length())}
        if tag == b"a":
            return self._tensor()
        content = self._take(self._length())
        if tag == b"i":
            return int.from_bytes(content, "little", signed=True)
        if tag == b"s":
            return str(content, "utf-8", "surrogatepass")
        if tag == b"b":
            return bytes(content)
        raise ValueError(f"damaged message: {tag!r} stands for nothing")

    def _items(self) -> Iterable[Any]:
        code = str(self._tag(), "ascii")
        if code == "*":
            return [self.value() for _ in range(self._length())]
        return self._array(code)

    def _array(self, code: str) -> array[Any]:
        values: array[Any] = array(code)
        values.frombytes(self._take(self._length()))
        return values

    def _tensor(self) -> torch.Tensor:
        (name, shape), content = self.value(), self.value()
        if not content:
            if 0 not in shape:
                raise ValueError("damaged message: a tensor without its elements")
            return torch.empty(shape, dtype=_DTYPES[name])
        return torch.frombuffer(bytearray(content), dtype=_DTYPES[name]).view(shape)
