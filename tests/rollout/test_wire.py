"""Wires: what is sent comes whole and in order, and nobody waits for who stands still."""

import multiprocessing
import os
import pickle
import queue
import random
import threading

import pytest

from samebit.rollout import wire as wire_module
from samebit.rollout.wire import Wire, packed

END = object()


class Heard:
    """What came of a wire: messages, and then END with what ended it."""

    def __init__(self):
        self.queue = queue.SimpleQueue()

    def end(self, error):
        self.queue.put((END, error))

    def next(self, count=None):
        if count is None:
            return self.queue.get(timeout=60)
        return [self.queue.get(timeout=60) for _ in range(count)]


@pytest.fixture
def ends():
    """A wire, what it hears, and the connection at its other end."""
    ours, theirs = multiprocessing.Pipe()
    heard = Heard()
    wire = Wire(ours, heard.queue.put, heard.end)
    yield wire, heard, theirs
    wire.close()
    theirs.close()


def big(size, seed=0):
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("sizes", [(0, 1, 3), (16_380, 16_390, 5), (1 << 20, 7, 3 << 20)])
def test_messages_come_whole_and_in_order(ends, sizes):
    wire, heard, theirs = ends
    messages = [(i, big(size, i)) for i, size in enumerate(sizes * 3)]
    sender = threading.Thread(target=lambda: [theirs.send(message) for message in messages])
    sender.start()
    assert heard.next(len(messages)) == messages
    sender.join()
    for message in messages:
        wire.send(packed(message))
    assert [theirs.recv() for _ in messages] == messages


def test_any_part_of_a_message_may_come_alone(ends):
    """Byte by byte, or the end of one with the beginning of the next."""
    _, heard, theirs = ends
    messages = [b"a", list(range(40)), "b" * 100]
    stream = b"".join(map(packed, messages))
    for i in range(len(stream)):
        os.write(theirs.fileno(), stream[i : i + 1])
    assert heard.next(3) == messages
    for i in range(0, len(stream), 50):
        os.write(theirs.fileno(), stream[i : i + 50])
    assert heard.next(3) == messages


def test_long_messages_have_long_lengths(ends, monkeypatch):
    """As multiprocessing writes and reads them, from 2 GiB on."""
    wire, heard, theirs = ends
    monkeypatch.setattr(wire_module, "_MOST", 10)
    stream = packed("long enough") + packed(7)
    assert stream[:4] == b"\xff\xff\xff\xff"
    wire.send(stream)
    assert [theirs.recv(), theirs.recv()] == ["long enough", 7]
    os.write(theirs.fileno(), stream)
    assert heard.next(2) == ["long enough", 7]


def test_who_takes_nothing_in_holds_up_nobody(ends):
    """Neither who sends to it, nor those who hear of others; it gets all when it reads again."""
    wire, heard, theirs = ends
    messages = [(i, big(1 << 20, i)) for i in range(8)]
    for message in messages:
        wire.send(packed(message))
    other, far = multiprocessing.Pipe()
    alive = Heard()
    second = Wire(other, alive.queue.put, alive.end)
    far.send("still there")
    assert alive.next() == "still there"
    second.close()
    theirs.send("and so am I")
    assert heard.next() == "and so am I"
    assert [theirs.recv() for _ in messages] == messages
    wire.send(packed("last"))
    assert theirs.recv() == "last"


def test_two_that_only_send_at_first(ends):
    """Each is told more than a socket holds before it reads."""
    wire, heard, theirs = ends
    messages = [big(1 << 20, i) for i in range(4)]

    def echo():
        for message in messages:
            theirs.send(message)
        found.extend(theirs.recv() for _ in messages)

    found = []
    other = threading.Thread(target=echo)
    other.start()
    for message in messages:
        wire.send(packed(message))
    assert heard.next(4) == messages
    other.join()
    assert found == messages


def test_many_threads_may_send(ends):
    wire, _, theirs = ends
    threads = [
        threading.Thread(target=lambda i=i: [wire.send(packed((i, j))) for j in range(200)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    found = [theirs.recv() for _ in range(800)]
    for thread in threads:
        thread.join()
    for i in range(4):
        assert [j for owner, j in found if owner == i] == list(range(200))


def test_the_end_comes_once_and_behind_what_was_said(ends):
    wire, heard, theirs = ends
    theirs.send("last words")
    theirs.close()
    assert heard.next(2) == ["last words", (END, None)]
    wire.send(packed("to nobody"))
    wire.close()
    wire.send(packed("to nobody"))
    assert heard.queue.empty()


def test_half_a_message_is_none(ends):
    _, heard, theirs = ends
    os.write(theirs.fileno(), packed("cut short")[:-1])
    theirs.close()
    assert heard.next() == (END, None)


class Strange:
    def __reduce__(self):
        return int, ("no number",)


def test_what_cannot_be_taken_ends_a_wire_alone(ends):
    """A message that cannot be read, or that whoever takes it does not; the thread reads on."""
    _, heard, theirs = ends
    theirs.send(Strange())
    kind, error = heard.next()
    assert kind is END
    assert isinstance(error, ValueError)

    ours, far = multiprocessing.Pipe()
    last = Heard()

    def refuse(message):
        raise KeyError(message)

    wire = Wire(ours, refuse, last.end)
    far.send("unwanted")
    kind, error = last.next()
    assert (kind, error.args) == (END, ("unwanted",))
    wire.close()


def test_an_end_that_raises_stops_nobody_else(ends, caplog):
    _, heard, theirs = ends
    ours, far = multiprocessing.Pipe()
    wire = Wire(ours, print, lambda _: 1 / 0)
    far.close()
    theirs.send("here")
    assert heard.next() == "here"
    wire.close()


def test_what_cannot_be_sent_says_so_at_once():
    with pytest.raises((AttributeError, pickle.PicklingError)):
        packed(lambda: None)


def test_silence_is_since_anything_came(monkeypatch):
    """And none where something waits to be read here."""
    now, taking, go_on = 100.0, threading.Event(), threading.Event()
    monkeypatch.setattr(wire_module, "monotonic", lambda: now)

    def take(message):
        taking.set()
        go_on.wait()

    ours, theirs = multiprocessing.Pipe()
    wire = Wire(ours, take, print)
    now = 107.0
    assert wire.silent_s == 7
    theirs.send(1)
    taking.wait()
    now = 110.0
    assert wire.silent_s == 3
    theirs.send(2)
    assert wire.silent_s == 0
    go_on.set()
    wire.close()
    assert wire.silent_s == 3
