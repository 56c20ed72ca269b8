"""Connections between this process and the actors that Ray has started for it.

An actor connects to where this process listens, and both show that they know the key that Ray has
brought it. Ray itself says whether the actor is there.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

import psutil
import ray

from samebit.recipes.launch.ray_package import LostActorError, RayError, in_our_words

PLACE_S = 300.0
"""How long nodes, or an actor on them, may take to be there."""
LOOK_S = 0.5


@contextmanager
def starting(what: str, name: str) -> Iterator[None]:
    """Say that something could not be started on the cluster of that name, and why.

    Raises LostActorError for the death of an actor that had begun, RayError for all others.
    """
    try:
        with in_our_words(f"{what} could not be started on {name}"):
            yield
    except RayError as error:
        cause = error.__cause__
        if isinstance(cause, ray.exceptions.RayActorError) and not cause.actor_init_failed:
            raise LostActorError(str(error)) from cause
        raise


def connect(place: tuple[str, int], key: bytes) -> Connection:
    """The actor's end: to whoever listens there and knows the key."""
    connection = Client(place, authkey=key)
    _send_at_once(connection)
    return connection


def accept(listener: socket.socket, key: bytes, served: Any) -> Connection:
    """The connection of who knows the key; raises what has ended the actor before."""
    listener.settimeout(LOOK_S)
    deadline = time.monotonic() + PLACE_S
    while time.monotonic() < deadline:
        if has_ended(served, 0):
            ray.get(served)
        try:
            end, _ = listener.accept()
        except TimeoutError:
            continue
        end.settimeout(None)
        connection = Connection(end.detach())
        with suppress(AuthenticationError, EOFError, OSError):  # somebody else's
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            _send_at_once(connection)
            return connection
        connection.close()
    raise RayError(f"its actor did not connect within {PLACE_S:g} s")


def shut(connection: Connection) -> None:
    """End it for whoever reads at either end."""
    with suppress(OSError), _socket_of(connection) as end:  # it may be closed
        end.shutdown(socket.SHUT_RDWR)


def has_ended(served: Any, timeout: float | None) -> bool:
    """Whether an actor's call has ended, or ends within so many seconds; None: it is waited for."""
    return not ray.is_initialized() or bool(ray.wait([served], timeout=timeout)[0])


def end_actor(actor: Any) -> None:
    """Have Ray kill it. Asked of no Ray that is gone, it would begin anew."""
    if ray.is_initialized():
        with suppress(Exception):  # it is dead, or Ray is
            ray.kill(actor)


def interface_of(address: str) -> str | None:
    """The name of this machine's interface that has the address."""
    for interface, found in psutil.net_if_addrs().items():
        if any(each.address == address for each in found):
            return interface
    return None


def _send_at_once(connection: Connection) -> None:
    """Small messages wait for no others; a machine that vanishes is noticed in minutes."""
    with _socket_of(connection) as end:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10)):
            end.setsockopt(socket.IPPROTO_TCP, option, value)


def _socket_of(connection: Connection) -> socket.socket:
    """Another handle of what it goes over."""
    return socket.socket(fileno=os.dup(connection.fileno()))
