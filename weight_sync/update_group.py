"""The weight group that RL frameworks' trainers make, and whole tensors broadcast over it.

Rank 0 is the trainer. The group is made as frameworks make theirs, by a copy of torch's
init_process_group that leaves the default group alone, so that either end may be somebody else's.
At a loopback address nothing has to be known; at any other all ranks prove that they know one
secret (weight_sync.meeting) before the group is made.
"""

import time
from collections.abc import Iterator
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
    host_store,
    is_loopback,
    loopback_listener,
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


def join_update_group(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    group_name: str = "weight_update_group",
    backend: str = "nccl",
    timeout_s: float = 600.0,
    secret: str | None = None,
) -> dist.ProcessGroup:
    """Meet the other ranks; rank 0 listens at the address.

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
    if rank == 0 and is_local:
        store: dist.Store = host_store(loopback_listener(address, port), world_size, timeout)
    else:
        place = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
        with _meeting(f"no weight group at {address}:{port}"):
            store, _, _ = next(rendezvous(place, rank, world_size, timeout=timeout))
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
    return group


def leave_update_group(group: dist.ProcessGroup, is_broken: bool = False) -> None:
    """Let go of the group. is_broken: something may be under way in it, which is given up."""
    if is_broken and dist.get_backend(group) == "nccl":
        distributed_c10d._abort_process_group(group)
    else:
        dist.destroy_process_group(group)


class Broadcasts:
    """Takes tensors that rank 0 broadcasts, one after another; at the end `wait`.

    Every wait is of timeout_s at most. Raises LostMemberError if the group has lost a member.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self._group = group
        self._timeout_s = timeout_s
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

    def wait(self) -> None:
        """Return once all have arrived, and what was enqueued behind them is done."""
        self._unseen_bytes = 0
        if self.is_of_host:
            return
        deadline = time.monotonic() + self._timeout_s
        done = torch.cuda.Event()
        done.record()
        while not done.query():
            if time.monotonic() > deadline:
                raise LostMemberError(
                    f"the weight group lost a member: nothing came for {self._timeout_s} s"
                )
            time.sleep(_POLL_S)


@contextmanager
def _meeting(said: str) -> Iterator[None]:
    """Say in our words, and in one line, what torch says of ranks that do not come."""
    try:
        yield
    except RuntimeError as error:
        [first, *_] = str(error).splitlines() or [""]
        raise LostMemberError(f"{said}: {first}") from error
