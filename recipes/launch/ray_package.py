"""Whether Ray is there, and its errors in our words. Imports nothing of it."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

_REACH_S = 10.0
_SETTINGS = b"\4"  # the type of the first frame of HTTP/2, from either end
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)


class RayError(RuntimeError):
    """Ray cannot be reached, or cannot do what is asked of it."""


class LostActorError(RayError):
    """An actor or its node has died; starting again may help."""


def require_ray(why: str) -> None:
    """Raise ImportError, with what would do, unless the package is installed."""
    if find_spec("ray") is None:
        raise ImportError(
            f"{why} needs the package ray: pip install 'samebit[ray]', with constraints.txt"
        )


def require_own_cluster(key: str, address: str | None) -> None:
    """Raise ValueError where a cluster would be started beside the one that RAY_ADDRESS names.

    key: that of the address which was given, or not. Ray's jobs find the variable set.
    """
    other = os.environ.get("RAY_ADDRESS")
    if other and address is None:
        raise ValueError(
            f"{key} is unset, which starts a cluster on this machine, and RAY_ADDRESS is "
            f"{other!r}; give auto or host:port, or unset RAY_ADDRESS"
        )


@contextmanager
def in_our_words(what: str) -> Iterator[None]:
    """Say what Ray could not do; its own errors are long, and of many types."""
    try:
        yield
    except RayError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise RayError(f"{what}: {said[0]}") from error


def require_reachable(address: str) -> None:
    """See that something there speaks gRPC: Ray itself would try for a quarter of an hour."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S) as end:
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            end.sendall(_HTTP2_HELLO)
            if end.recv(9)[3:4] != _SETTINGS:
                raise ConnectionError("what listens there is not Ray")


def is_on_gpu(device: str | None, resources: Mapping[str, float]) -> bool:
    """Whether a run with this `device` is on GPUs where Ray has these resources."""
    return (device or ("cuda" if resources.get("GPU") else "cpu")).startswith("cuda")
