"""What processes tell each other: plain values, as bytes and back to the bit.

Plain are None, bool, int, float, str, bytes, list, tuple, dict, array.array of numbers, and tensors
in the CPU's memory. To decode runs nothing that the bytes name, as a pickle would: at worst it
raises ValueError. All machines have one byte order.
"""

import struct
import threading
from array import array
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.weight_sync.meeting import meeting_device

_DTYPES = {
    str(dtype): dtype
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    + (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_NUMBERS = "bBhHiIlLqQfd"
_PACKED = {int: "q", float: "d"}  # how a list or tuple whose items are all of this type is stored
_OF_THREAD = threading.local()
_HEADER = struct.Struct("<cq")  # of every value: what it is, and how many bytes follow


def encode(value: Any) -> bytes:
    """The value's bytes. Raises TypeError for another type, also for a subclass of these."""
    kind = type(value)
    if value is None:
        return _record(b"N")
    if kind is bool:
        return _record(b"T" if value else b"F")
    if kind is int:
        return _record(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if kind is float:
        return _record(b"f", struct.pack("<d", value))
    if kind is str:
        return _record(b"s", value.encode("utf-8", "surrogatepass"))
    if kind is bytes:
        return _record(b"b", value)
    if kind is array and value.typecode in _NUMBERS:
        return _record(b"r", value.typecode.encode(), value.tobytes())
    if kind is list or kind is tuple:
        if (packed := _packed(value)) is not None:
            return _record(b"L" if kind is list else b"U", encode(packed))
        return _record(b"l" if kind is list else b"t", *map(encode, value))
    if kind is dict:
        return _record(b"m", *(encode(item) for pair in value.items() for item in pair))
    if isinstance(value, Tensor) and value.device.type == "cpu":
        content = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return _record(b"a", encode(str(value.dtype)), encode(tuple(value.shape)), encode(content))
    where = f" on {value.device}" if isinstance(value, Tensor) else ""
    raise TypeError(f"{kind.__module__}.{kind.__qualname__}{where} is no plain value")


def decode(data: bytes) -> Any:
    """The value that was encoded. Raises ValueError for anything else."""
    try:
        value, rest = _first(memoryview(data))
    except (struct.error, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"damaged message: {error}") from None
    if rest:
        raise ValueError(f"damaged message: {len(rest)} bytes too many")
    return value


def gather_by(group: dist.ProcessGroup) -> None:
    """Have this thread's `gather_objects` go by this group of all processes, so that it may gather
    while other threads do. Such threads of all processes gather alike."""
    _OF_THREAD.group = group


def gather_objects[T](value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every process's plain value, in rank order (of all processes, or of a group).

    A thread that has called `gather_by` has a group of its own for all processes. Without
    torch.distributed there is one value. Raises TypeError for one that is not plain.
    """
    group = getattr(_OF_THREAD, "group", None) if group is None else group
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


def _gather(x: Tensor, size: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x, group=group)
    return parts


def _record(tag: bytes, *parts: bytes) -> bytes:
    return b"".join((_HEADER.pack(tag, sum(map(len, parts))), *parts))


def _packed(items: list[Any] | tuple[Any, ...]) -> array[Any] | None:
    """The items in one piece, if all are integers of at most 64 bits, or all are floats."""
    kinds = set(map(type, items))
    code = _PACKED.get(kinds.pop()) if len(kinds) == 1 else None
    try:
        return None if code is None else array(code, items)
    except OverflowError:
        return None


def _first(data: memoryview) -> tuple[Any, memoryview]:
    """The value that the data begin with, and what comes behind it."""
    start = _HEADER.size
    tag, length = _HEADER.unpack(data[:start]) if len(data) >= start else (b"", 0)
    if not tag or not 0 <= length <= len(data) - start:
        raise ValueError("damaged message: it ends too early")
    return _value(tag, data[start : start + length]), data[start + length :]


def _values(data: memoryview) -> list[Any]:
    values = []
    while data:
        value, data = _first(data)
        values.append(value)
    return values


def _value(tag: bytes, content: memoryview) -> Any:
    match tag:
        case b"N":
            return None
        case b"T" | b"F":
            return tag == b"T"
        case b"i":
            return int.from_bytes(content, "little", signed=True)
        case b"f":
            return struct.unpack("<d", content)[0]
        case b"s":
            return str(content, "utf-8", "surrogatepass")
        case b"b":
            return bytes(content)
        case b"r":
            return array(str(content[:1], "ascii"), bytes(content[1:]))
        case b"l" | b"t":
            return _values(content) if tag == b"l" else tuple(_values(content))
        case b"L" | b"U":
            packed = _values(content)
            if len(packed) != 1 or type(packed[0]) is not array:
                raise ValueError("damaged message: a list of no numbers")
            return list(packed[0]) if tag == b"L" else tuple(packed[0])
        case b"m":
            items = _values(content)
            return dict(zip(items[::2], items[1::2], strict=True))
        case b"a":
            return _tensor(*_values(content))
    raise ValueError(f"damaged message: {tag!r} stands for nothing")


def _tensor(name: str, shape: tuple[int, ...], content: bytes) -> Tensor:
    if not content:
        if 0 not in shape:
            raise ValueError("damaged message: a tensor without its elements")
        return torch.empty(shape, dtype=_DTYPES[name])
    return torch.frombuffer(bytearray(content), dtype=_DTYPES[name]).view(shape)
