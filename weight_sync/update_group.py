"""The weight group that RL frameworks' trainers make, and whole tensors broadcast over it.

Rank 0 is the trainer. The group is made as frameworks make theirs, by a copy of torch's
init_process_group that leaves the default group alone, so that either end may be somebody else's.
At a loopback address nothing has to be known; at any other all ranks prove that they know one
secret (weight_sync.meeting) before the group is made.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from samebit.weight_sync.meeting import (
    check_place,
    check_secret,
    is_loopback,
    on_loopback,
    own_secret,
    prove_secret,
)
from samebit.weight_sync.transports.group import lost_members
from samebit.weight_sync.types import LostMemberError

BACKENDS = ("nccl", "gloo")
_UNSEEN_BYTES = 512 << 20
"""On their way at most before they are waited for: a bound of the buffers' memory."""
_POLL_S = 0.0005
_LOST_S = 5.0
"""How long what rank 0 has sent may still be on its way once its process has ended."""
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 8}
"""A machine that vanishes is missed after three minutes, and no silent connection is dropped."""


class UpdateGroup:
    """A group that this process has joined behind rank 0.

    timeout_s: how long a member may stay away. sight: a connection with the store of rank 0's
    process. Nothing is ever said on it: it ends with that process, or as that lets go of the group,
    while one that is merely slow, or stopped, keeps it. Of a store in another process, as of
    torch's elastic agent, it tells that one's end.
    """

    def __init__(
        self, name: str, group: dist.ProcessGroup, timeout_s: float, sight: socket.socket
    ) -> None:
        self.name = name
        self._group: dist.ProcessGroup | None = group
        self._timeout_s = timeout_s
        self._sight = sight
        self._sight.setblocking(False)
        self._sight.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in _KEEPALIVE.items():
            self._sight.setsockopt(socket.IPPROTO_TCP, option, seconds)

    @property
    def is_lost(self) -> bool:
        """Whether rank 0's process has ended. Asks nobody and waits for nothing."""
        try:
            return not self._sight.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def broadcasts(self) -> "Broadcasts":
        """What takes the tensors that rank 0 sends next."""
        assert self._group is not None
        return Broadcasts(self._group, self._timeout_s, lambda: self.is_lost)

    def leave(self, is_broken: bool = False) -> None:
        """Let go of the group. is_broken: something may be under way in it, which is given up."""
        group, self._group = self._group, None  # its connections end with the last who holds it
        assert group is not None
        self._sight.close()
        if is_broken and dist.get_backend(group) == "nccl":
            distributed_c10d._abort_process_group(group)
        else:
            dist.destroy_process_group(group)


def join_update_group(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    group_name: str = "weight_update_group",
    backend: str = "nccl",
    timeout_s: float = 600.0,
    secret: str | None = None,
) -> UpdateGroup:
    """Meet the other ranks, as one behind rank 0, which listens at the address.

    secret: by default SAMEBIT_SECRET of the environment. Raises ValueError for an unknown backend,
    a place that cannot be, or a secret that is missing or another one, and LostMemberError for
    ranks that do not come within timeout_s, or under another group_name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend '{backend}' is unknown; use one of {', '.join(BACKENDS)}")
    check_place(address, port, rank, world_size, timeout_s)
    secret = own_secret() if secret is None else secret
    is_local, timeout = is_loopback(address), timedelta(seconds=timeout_s)
    check_secret(secret, "" if is_local else f"the group '{group_name}' meets at {address}")
    place = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
    with _meeting(f"no weight group at {address}:{port}"):
        store, _, _ = next(rendezvous(place, rank, world_size, timeout=timeout))
        sight = socket.create_connection((address, port), timeout_s)
    store.set_timeout(timeout)
    if secret:
        prove_secret(store, rank, world_size, secret, timeout)
    said = f"no weight group '{group_name}' of {world_size} ranks at {address}:{port}"
    with on_loopback(is_local), _meeting(said):
        group, _ = distributed_c10d._new_process_group_helper(
            *(world_size, rank, [], backend, dist.PrefixStore(group_name, store)),
            group_name=distributed_c10d.GroupName(group_name),
            # NCCL's watchdog would end the process; who waits gives the group up before that.
            timeout=timeout if backend == "gloo" else 2 * timeout + timedelta(minutes=1),
        )
    assert isinstance(group, dist.ProcessGroup)
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return UpdateGroup(group_name, group, timeout_s, sight)


class Broadcasts:
    """Takes tensors that rank 0 broadcasts, one after another; at the end `wait`.

    Every wait is of timeout_s at most, and short once rank 0 is_lost. Raises LostMemberError if the
    group has lost a member.
    """

    def __init__(
        self, group: dist.ProcessGroup, timeout_s: float, is_lost: Callable[[], bool]
    ) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self._is_lost = is_lost
        self._unseen_bytes = 0

    @property
    def is_of_host(self) -> bool:
        """Whether tensors travel through host memory."""
        return dist.get_backend(self._group) == "gloo"

    def receive(self, tensor: Tensor) -> None:
        """Fill a contiguous tensor; on a GPU its stream waits for that, not the host."""
        with lost_members():
            dist.broadcast(tensor, group_src=0, group=self._group, async_op=True).wait()
        self._unseen_bytes += tensor.nbytes
        if self._unseen_bytes >= _UNSEEN_BYTES:
            self.wait()

    def receive_bytes(self, num_bytes: int) -> Tensor:
        """A flat buffer of so many bytes, uint8, which have arrived."""
        flat = torch.empty(
            num_bytes, dtype=torch.uint8, device="cpu" if self.is_of_host else "cuda"
        )
        self.receive(flat)
        self.wait()
        return flat

    def wait(self) -> None:
        """Return once all have arrived, and what was enqueued behind them is done."""
        self._unseen_bytes = 0
        if self.is_of_host:
            return
        deadline = time.monotonic() + self._timeout_s
        done = torch.cuda.Event()
        done.record()
        is_lost = False
        while not done.query():
            if not is_lost and self._is_lost():
                is_lost, deadline = True, min(deadline, time.monotonic() + _LOST_S)
            if time.monotonic() > deadline:
                if is_lost:
                    raise LostMemberError("the weight group lost a member: rank 0 has ended")
                raise LostMemberError(
                    f"the weight group lost a member: nothing came for {self._timeout_s} s"
                )
            time.sleep(_POLL_S)


@contextmanager
def _meeting(said: str) -> Iterator[None]:
    """Say in our words, and in one line, what torch says of ranks that do not come."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        [first, *_] = str(error).splitlines() or [""]
        raise LostMemberError(f"{said}: {first}") from error
