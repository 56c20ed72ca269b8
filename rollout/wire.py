"""Wires: connections with other processes; whoever sends does not wait, one thread serves all.

A process that stands still takes nothing in, and must hold up nobody but those who wait for its
answers. What it does not take yet is kept here. The other end is multiprocessing's Connection:
each message is pickled, behind its length.
"""

import logging
import os
import pickle
import select
import struct
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from time import monotonic
from typing import Any

logger = logging.getLogger(__name__)

_CHUNK = 1 << 18
_LENGTH, _LONG = struct.Struct("!i"), struct.Struct("!Q")  # -1, and then the other one
_MOST = (1 << 31) - 1


def packed(message: object) -> bytes:
    """A message as it is sent. Raises what pickle does for one that cannot be."""
    payload = ForkingPickler.dumps(message)
    size = len(payload)
    head = _LENGTH.pack(size) if size <= _MOST else _LENGTH.pack(-1) + _LONG.pack(size)
    return head + payload


class Wire:
    """One connection, whose file it owns from here on. Any thread may send."""

    def __init__(
        self,
        connection: Connection,
        take: Callable[[Any], object],
        end: Callable[[Exception | None], object],
    ) -> None:
        """take: called with each message. end: called once, when the other end is gone or a message
        could not be taken, with what that raised. Both in the thread that reads all wires, which
        they must not hold up."""
        self._connection, self._take, self._end = connection, take, end
        self._fd = connection.fileno()
        os.set_blocking(self._fd, False)
        self._lock = threading.Lock()  # of the file, and of what is unsent
        self._is_open = True
        self._unread = bytearray()
        self._unsent: deque[memoryview] = deque()
        self._waits_for_room = False
        self._heard_at = monotonic()
        _reader().add(self._fd, self)

    @property
    def silent_s(self) -> float:
        """Seconds since anything came; 0 while there is something that is not read yet."""
        with suppress(OSError):  # it is closed
            if self._connection.poll():
                return 0.0
        return monotonic() - self._heard_at

    def send(self, message: bytes) -> None:
        """Have what was `packed` sent as the other end takes it; one that is gone takes nothing
        more. The thread that reads sends it, too: no signal interrupts that halfway."""
        with self._lock:
            if not self._is_open:
                return
            self._unsent.append(memoryview(message))
            if not self._waits_for_room:
                _reader().wait_for_room(self._fd, True)
                self._waits_for_room = True

    def close(self) -> None:
        """Close the connection; nothing more is taken."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                _reader().remove(self._fd)
            self._connection.close()

    def handle(self, events: int, chunk: memoryview) -> None:
        """Do what there is to do, in the thread that reads, to where `chunk` is."""
        if events & select.EPOLLOUT:
            with self._lock:
                if self._is_open and self._write():
                    _reader().wait_for_room(self._fd, False)
                    self._waits_for_room = False
        if events & ~select.EPOLLOUT:
            self._read(chunk)

    def _write(self) -> bool:
        """Send what is unsent, as far as there is room: whether that was all. Holds the lock."""
        while self._unsent:
            try:
                count = os.write(self._fd, self._unsent[0])
            except BlockingIOError:
                return False
            except OSError:  # the other end is gone, which whoever reads finds, too
                self._unsent.clear()
                break
            if count == len(self._unsent[0]):
                self._unsent.popleft()
            else:
                self._unsent[0] = self._unsent[0][count:]
        return True

    def _read(self, chunk: memoryview) -> None:
        """chunk: where to read to."""
        with self._lock:
            if not self._is_open:
                return
            try:
                count = os.readv(self._fd, [chunk])
            except BlockingIOError:
                return
            except OSError:
                count = 0
        if not count:
            self._finish(None)
            return
        self._heard_at = monotonic()
        try:
            if self._unread:
                self._unread += chunk[:count]
                with memoryview(self._unread) as unread:
                    stop = self._take_all(unread)
                del self._unread[:stop]
            else:
                stop = self._take_all(chunk[:count])
                self._unread += chunk[stop:count]
        except Exception as error:  # noqa: BLE001 - a message is lost: nobody may wait for it
            self._finish(error)

    def _take_all(self, unread: memoryview) -> int:
        """Take the messages that are here as a whole; where they stop."""
        begin = 0
        while (found := _payload_of(unread, begin)) is not None:
            start, begin = found
            with unread[start:begin] as payload:
                message = pickle.loads(payload)
            self._take(message)
        return begin

    def _finish(self, error: Exception | None) -> None:
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            _reader().remove(self._fd)
        self._end(error)


def _payload_of(unread: memoryview, begin: int) -> tuple[int, int] | None:
    """Where the payload of the message that begins there starts and stops, if all of it is here."""
    start = begin + _LENGTH.size
    if len(unread) < start:
        return None
    (size,) = _LENGTH.unpack_from(unread, begin)
    if size == -1:
        if len(unread) < start + _LONG.size:
            return None
        (size,) = _LONG.unpack_from(unread, start)
        start += _LONG.size
    return None if len(unread) < start + size else (start, start + size)


class _Reader:
    """The thread that reads and sends; wires by their files. Any thread may add and remove them."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wires: dict[int, Wire] = {}
        threading.Thread(target=self._run, name="samebit answers", daemon=True).start()

    def add(self, fd: int, wire: Wire) -> None:
        self._wires[fd] = wire
        self._epoll.register(fd, select.EPOLLIN)

    def wait_for_room(self, fd: int, wanted: bool) -> None:
        """Whether to look for room to write, too."""
        self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def remove(self, fd: int) -> None:
        if self._wires.pop(fd, None) is not None:  # else it is the parent's of a fork
            self._epoll.unregister(fd)

    def _run(self) -> None:
        chunk = memoryview(bytearray(_CHUNK))
        while True:
            for fd, events in self._epoll.poll():
                if (wire := self._wires.get(fd)) is not None:
                    try:
                        wire.handle(events, chunk)
                    except Exception:  # of an `end`: the other wires go on
                        logger.exception("the end of a connection could not be told")


_making = threading.Lock()
_only: list[_Reader] = []


def _reader() -> _Reader:
    """This process's, made when it is needed."""
    with _making:
        if not _only:
            _only.append(_Reader())
        return _only[0]


os.register_at_fork(after_in_child=_only.clear)  # a thread stays with its process
