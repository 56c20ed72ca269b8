"""What processes tell each other: to the bit, and nothing that runs."""

import math
import pickle
import random
import struct
from array import array
from contextlib import suppress
from enum import IntEnum

import pytest
import torch
from helpers import assert_same_bits

from samebit.weight_sync.objects import _HEADER, decode, encode

VALUES = [
    *(None, True, False, 0, 1, -1, 255, -256, (1 << 63) - 1, 1 << 63, -(1 << 80)),
    *(0.5, -0.0, math.inf, 5e-324, "", "7 + 8 = é\n", "half of a pair: \ud800", b"", b"\x00\xff"),
    *([], (), {}, [1, 2, 3], (1, 2, 3), [1.5, -0.0], (math.pi,), [True, 1], [1, 1.0], [1 << 70, 2]),
    {"a": (1, [2.5, {"b": None}]), 7: "x", None: [], (1, "y"): [[], [[]]]},
    [(array("i", [5, -6]), array("f", [0.5]), "stop", [(0, 3, "9f86d081884c7d65")])],
]


def with_types(value):
    """The value and every type in it, floats as their bits."""
    match value:
        case float():
            return value.hex(), math.copysign(1, value)
        case list() | tuple():
            return type(value), [with_types(item) for item in value]
        case dict():
            return [(with_types(k), with_types(v)) for k, v in value.items()]
    return type(value), value


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_as_it_was(value):
    assert with_types(decode(encode(value))) == with_types(value)


def test_a_nan_keeps_its_bits():
    [odd] = struct.unpack("<d", bytes.fromhex("efbeaddeefbef8ff"))
    for found in (decode(encode(odd)), decode(encode([odd]))[0], decode(encode((1, odd)))[1]):
        assert struct.pack("<d", found).hex() == "efbeaddeefbef8ff"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3)])
def test_tensors(shape, dtype):
    value = (torch.randn(shape) * 3).to(dtype)
    assert_same_bits(decode(encode([value]))[0], value)
    turned = value.mT if value.ndim > 1 else value  # not contiguous
    assert_same_bits(decode(encode(turned)), turned)


class Colour(IntEnum):
    RED = 1


@pytest.mark.parametrize("value", [Colour.RED, {1}, 1j, object(), torch.zeros(2, device="meta")])
def test_other_types_are_named(value):
    """Also a subclass, which would come back as something else."""
    with pytest.raises(TypeError, match=f"{type(value).__name__}.* is no plain value"):
        encode({"a": [value]})


class Evil:
    def __reduce__(self):
        return pytest.fail, ("a message was run",)


def test_no_message_is_run():
    """A pickle is noise; and of the message of a peer that went mad nothing but an error comes."""
    with pytest.raises(ValueError, match="damaged message"):
        decode(pickle.dumps(Evil()))
    for content in (encode("text"), encode(array("d", [1.0])) * 2):
        with pytest.raises(ValueError, match="damaged message: a list of no numbers"):
            decode(_HEADER.pack(b"L", len(content)) + content)
    whole = encode([*VALUES, torch.ones(3), array("d", [1.0])])
    for end in range(0, len(whole), 7):
        with pytest.raises(ValueError, match="damaged message"):
            decode(whole[:end])
    with pytest.raises(ValueError, match="2 bytes too many"):
        decode(encode(1) + b"xx")


def test_noise_is_refused_or_a_value():
    """Whatever byte is hit, there is no other error, and no endless memory."""
    whole, noise = encode([*VALUES, torch.ones(3)]), random.Random(0)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(3):
            data[noise.randrange(len(data))] = noise.randrange(256)
        with suppress(ValueError):
            decode(bytes(data))
