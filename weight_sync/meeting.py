"""How the processes of a group find and know each other.

On one machine everything listens on the loopback alone. On several machines the ranks show each
other that they know one secret, SAMEBIT_SECRET, before any group is used: an answer to a question
of each, so that nothing that was seen on the network can be said again.
"""

import hmac
import ipaddress
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

SECRET = "SAMEBIT_SECRET"
LOOPBACK = "127.0.0.1"
_GLOO_INTERFACE, _NCCL_INTERFACE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_LOOK_S = 0.01
MIN_SECRET = 16
"""Characters of a secret."""
_given: list[str] = []
_HOW = f"set {SECRET} to the same random text everywhere, for instance of `openssl rand -hex 32`"


def meeting_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where small tensors go that a group exchanges: to the host, unless it only knows GPUs."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def is_loopback(address: str) -> bool:
    """Whether nobody outside this machine can reach this address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def is_on_one_machine() -> bool:
    """Whether all processes that the environment names run on this machine, as far as it says."""
    size = os.environ.get("WORLD_SIZE", "1")
    if (here := os.environ.get("LOCAL_WORLD_SIZE")) is not None:
        return here == size
    return size == "1" or is_loopback(os.environ.get("MASTER_ADDR", ""))


def check_place(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
    """ValueError unless a rank of world_size may meet the others there, within timeout_s."""
    if not isinstance(address, str) or not address or "/" in address:
        raise ValueError(f"the address is {address!r}; it must be a host's name or number")
    if not 1 <= port <= 65535:
        raise ValueError(f"the port is {port}; it must be in [1, 65535]")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be in [0, world_size = {world_size})")
    if not 0 < timeout_s < 1e8:
        raise ValueError(f"timeout_s is {timeout_s}; it must be positive, and below 1e8")


def stay_on_loopback() -> None:
    """Keep the groups of this process, and of those it starts, on the loopback, unless the
    environment names another interface."""
    for name in (_GLOO_INTERFACE, _NCCL_INTERFACE):
        os.environ.setdefault(name, "lo")


@contextmanager
def on_loopback(is_local: bool) -> Iterator[None]:
    """Have a local group that is made in the block stay on the loopback, unless the environment
    names an interface. NCCL's is named for good: it looks when its first group is first used."""
    if not is_local:
        yield
        return
    os.environ.setdefault(_NCCL_INTERFACE, "lo")
    with gloo_on_loopback():
        yield


@contextmanager
def gloo_on_loopback() -> Iterator[None]:
    """Have gloo's groups that are made in the block stay on the loopback, unless the environment
    names an interface."""
    given = os.environ.get(_GLOO_INTERFACE)
    os.environ.setdefault(_GLOO_INTERFACE, "lo")
    try:
        yield
    finally:
        if given is None:
            del os.environ[_GLOO_INTERFACE]


def loopback_listener(address: str = LOOPBACK, port: int = 0) -> socket.socket:
    """A socket that listens on the loopback alone; by default the system chooses the port."""
    return listener_at(address, port)


def listener_at(address: str, port: int = 0) -> socket.socket:
    """A socket that listens at one of this machine's addresses."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family)


def own_address(address: str, port: int) -> str:
    """This machine's own address on the way to another's; nothing is sent."""
    family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return probe.getsockname()[0]


def names_interface() -> bool:
    """Whether the environment names an interface for gloo, other than the loopback that
    `stay_on_loopback` has named."""
    return os.environ.get(_GLOO_INTERFACE, "lo") != "lo"


def host_store(
    listener: socket.socket, size: int | None = None, timeout: timedelta = timedelta(minutes=5)
) -> dist.TCPStore:
    """A store behind a listening socket, which it takes over. It waits for nobody."""
    address, port = listener.getsockname()[:2]
    return dist.TCPStore(
        *(address, port, size),
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def own_secret() -> str:
    """SAMEBIT_SECRET as this process was started with, "" for none. It is taken out of the
    environment when first asked for: what this process starts has no need of it."""
    if (given := os.environ.pop(SECRET, None)) is not None:
        _given[:] = [given]
    return _given[0] if _given else ""


def check_secret(secret: str, why: str = "") -> None:
    """ValueError for a secret that is too short; and, if there is a reason `why`, for none."""
    if not isinstance(secret, str):
        raise ValueError(f"the secret is of type {type(secret).__name__}; it must be a text")
    if not secret and why:
        raise ValueError(f"{why}, and {SECRET} is not set; {_HOW}")
    if secret and len(secret) < MIN_SECRET:
        raise ValueError(
            f"{SECRET} has {len(secret)} characters; it must have at least {MIN_SECRET}: {_HOW}"
        )


def prove_secret(
    store: dist.Store,
    rank: int,
    size: int,
    secret: str,
    timeout: timedelta = timedelta(minutes=10),
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Show the other ranks of a store that this one knows the secret, and see that they do.

    "": there is none, which has to be so for all. watch is called now and then. Raises ValueError
    that names the rank which has none, or another one, or says nothing.
    """
    store = dist.PrefixStore("samebit_secret", store)
    store.set(f"question_{rank}", secrets.token_hex(16))
    questions = [_read(store, "question", r, timeout, watch) for r in range(size)]

    def proof_of(prover: int) -> str:
        message = f"samebit {prover} of {size}: {' '.join(questions)}"
        return hmac.new(secret.encode(), message.encode(), "sha256").hexdigest() if secret else "-"

    store.set(f"proof_{rank}", proof_of(rank))
    shown = [_read(store, "proof", r, timeout, watch) for r in range(size)]
    store.set(f"read_{rank}", "")
    for other, proof in enumerate(shown):
        if not hmac.compare_digest(proof.encode(), proof_of(other).encode()):
            if rank == 0:
                _wait_for_readers(store, size, timeout)
            has = f"no {SECRET}" if proof == "-" else f"another {SECRET} than rank {rank}"
            raise ValueError(f"rank {other} has {has}; {_HOW}")


def _wait_for_readers(store: dist.Store, size: int, timeout: timedelta) -> None:
    """The store ends with rank 0: the others are to have read by then whose secret is another."""
    with suppress(RuntimeError):  # one that shows what it does not know reads nothing
        store.wait([f"read_{r}" for r in range(size)], min(timeout, timedelta(seconds=5)))


def _read(
    store: dist.Store, what: str, rank: int, timeout: timedelta, watch: Callable[[], None]
) -> str:
    deadline, key = time.monotonic() + timeout.total_seconds(), f"{what}_{rank}"
    try:
        while not store.check([key]):
            if time.monotonic() > deadline:
                raise RuntimeError("the time is up")
            watch()
            time.sleep(_LOOK_S)
        return store.get(key).decode(errors="replace")
    except RuntimeError:
        seconds = f"{timeout.total_seconds():g} s"
        if what == "question":
            missing = f"rank {rank} has not come within {seconds}, or rank 0 is gone"
        else:
            missing = f"rank {rank} has not shown within {seconds} that it knows {SECRET}; {_HOW}"
        raise ValueError(missing) from None
