"""reduce on GPUs, and gathers of columns: ranks read each other's fp32 memory over NVLink.

One kernel is the whole sum, so a CUDA graph may hold it. Every program copies its part of this
rank's partial to memory that the others see, tells the program of the same number on every rank,
waits for theirs, and adds.

Small sums are read whole by every rank (one shot). Of larger ones each rank adds its own part and
the others fetch that, already rounded (two shots); sequence parallel ranks keep their part.

The memory is torch's symmetric memory. Partials have a half for every second sum, so that a rank
may begin the next one while another still reads: ranks may be a sum apart, never two.
"""

import hashlib
import os
import socket
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

# NVLink's multicast is of no use here: it adds in an order of its own.
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

_PROGRAMS = 128
_BLOCK = 1024
_LARGE_BLOCK = 16384
"""Elements, over the number of ranks: a link is busy when megabytes are on their way."""
_ONE_SHOT_ELEMENTS = 1 << 19
"""Sums up to here are read whole by every rank."""
_LEAST_CAPACITY = 1 << 22
_MOST_GATHERED = 1 << 24
"""Elements of a rank gathered at a time."""
_ONE_SHOT, _TWO_SHOTS, _OWN_PART = (tl.constexpr(i) for i in range(3))


@triton.jit
def _memory_of(memories, rank: tl.constexpr, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(memories + rank).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _meet(memories, kind, epoch, RANK: tl.constexpr, SIZE: tl.constexpr, PROGRAMS: tl.constexpr):
    """Tell the same program of every other rank that this one is here, and wait for all of them.

    What any thread wrote before is seen by the others afterwards. Epochs may wrap around.
    """
    tl.debug_barrier()
    at = tl.program_id(0)
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            flag = _memory_of(memories, rank, tl.int32) + (kind * SIZE + RANK) * PROGRAMS + at
            tl.atomic_xchg(flag, epoch, sem="release", scope="sys")
    own = _memory_of(memories, RANK, tl.int32)
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            flag = own + (kind * SIZE + rank) * PROGRAMS + at
            while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - epoch < 0:
                pass
    tl.debug_barrier()


@triton.jit
def _turn(epochs, capacity, SIZE: tl.constexpr, PROGRAMS: tl.constexpr):
    """The kernel's number, and where its half of the partials starts: behind the flags."""
    epoch = tl.load(epochs + tl.program_id(0)) + 1
    return epoch, 2 * SIZE * PROGRAMS + (epoch & 1).to(tl.int64) * capacity


@triton.jit
def _end_turn(epochs, epoch, PROGRAMS: tl.constexpr):
    """Every counter counts the kernels, whatever their number of programs."""
    for j in range(tl.program_id(0), PROGRAMS, tl.num_programs(0)):
        tl.store(epochs + j, epoch)


@triton.jit
def _partial(memories, half, own, rank: tl.constexpr, at, live, RANK: tl.constexpr):
    if rank == RANK:
        partial = tl.load(own + at, live, other=0.0).to(tl.float32)
    else:
        partial = tl.load(_memory_of(memories, rank, tl.float32) + half + at, live, other=0.0)
    return partial


@triton.jit
def _total(memories, half, own, at, live, RANK: tl.constexpr, SIZE: tl.constexpr,
           TREE: tl.constexpr):  # fmt: skip
    """The sum from rank 0 upwards, or as the tree ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))."""
    total = _partial(memories, half, own, 0, at, live, RANK)
    if TREE and SIZE >= 4:
        total = total + _partial(memories, half, own, 1, at, live, RANK)
        second = _partial(memories, half, own, 2, at, live, RANK)
        total = total + (second + _partial(memories, half, own, 3, at, live, RANK))
        if SIZE == 8:
            third = _partial(memories, half, own, 4, at, live, RANK)
            third = third + _partial(memories, half, own, 5, at, live, RANK)
            last = _partial(memories, half, own, 6, at, live, RANK)
            total = total + (third + (last + _partial(memories, half, own, 7, at, live, RANK)))
    else:
        for rank in tl.static_range(1, SIZE):
            total = total + _partial(memories, half, own, rank, at, live, RANK)
    return total


@triton.jit
def _sum_kernel(
    partial, output, memories, epochs, numel, part, capacity, RANK: tl.constexpr,
    SIZE: tl.constexpr, MODE: tl.constexpr, TREE: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    # Elements of 4 bytes from the memory's start: flags, two halves of partials, results.
    epoch, half = _turn(epochs, capacity, SIZE, PROGRAMS)
    results = 2 * SIZE * PROGRAMS + 2 * capacity.to(tl.int64)
    i = tl.arange(0, BLOCK)
    own = _memory_of(memories, RANK, tl.float32)
    for p in tl.static_range(SIZE):
        if MODE == _ONE_SHOT or p != RANK:  # what this rank alone adds need not be seen
            for start in range(program * BLOCK, part, programs * BLOCK):
                at = p * part + start + i
                live = (start + i < part) & (at < numel)
                tl.store(own + half + at, tl.load(partial + at, live).to(tl.float32), live)
    _meet(memories, 0, epoch, RANK, SIZE, PROGRAMS)
    if MODE == _ONE_SHOT:
        for p in tl.static_range(SIZE):
            for start in range(program * BLOCK, part, programs * BLOCK):
                at = p * part + start + i
                live = (start + i < part) & (at < numel)
                total = _total(memories, half, partial, at, live, RANK, SIZE, TREE)
                tl.store(output + at, total.to(output.dtype.element_ty), live)
    else:
        if MODE == _OWN_PART:
            mine = output
        else:
            mine = (own + results).to(tl.pointer_type(output.dtype.element_ty))
        for start in range(program * BLOCK, part, programs * BLOCK):
            at = RANK * part + start + i
            live = (start + i < part) & (at < numel)
            total = _total(memories, half, partial, at, live, RANK, SIZE, TREE)
            total = total.to(output.dtype.element_ty)
            tl.store(mine + start + i, total, live)
            if MODE == _TWO_SHOTS:
                tl.store(output + at, total, live)
        if MODE == _TWO_SHOTS:
            _meet(memories, 1, epoch, RANK, SIZE, PROGRAMS)
            for p in tl.static_range(SIZE):
                if p != RANK:
                    theirs = _memory_of(memories, p, tl.float32) + results
                    theirs = theirs.to(tl.pointer_type(output.dtype.element_ty))
                    for start in range(program * BLOCK, part, programs * BLOCK):
                        at = p * part + start + i
                        live = (start + i < part) & (at < numel)
                        tl.store(output + at, tl.load(theirs + start + i, live), live)
    _end_turn(epochs, epoch, PROGRAMS)


@triton.jit
def _gather_kernel(
    part, output, memories, epochs, rows, width, capacity, RANK: tl.constexpr, SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every rank's [rows, width], side by side: [rows, SIZE * width]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    epoch, half = _turn(epochs, capacity, SIZE, PROGRAMS)
    i = tl.arange(0, BLOCK)
    blocks = tl.cdiv(width, BLOCK)
    own = _memory_of(memories, RANK, tl.float32)
    for block in range(program, rows * blocks, programs):
        row, column = (block // blocks).to(tl.int64), block % blocks * BLOCK + i
        values = tl.load(part + row * width + column, column < width)
        tl.store(own + half + row * width + column, values, column < width)
        tl.store(output + (row * SIZE + RANK) * width + column, values, column < width)
    _meet(memories, 0, epoch, RANK, SIZE, PROGRAMS)
    for p in tl.static_range(SIZE):
        if p != RANK:
            theirs = _memory_of(memories, p, tl.float32) + half
            for block in range(program, rows * blocks, programs):
                row, column = (block // blocks).to(tl.int64), block % blocks * BLOCK + i
                values = tl.load(theirs + row * width + column, column < width)
                tl.store(output + (row * SIZE + p) * width + column, values, column < width)
    _end_turn(epochs, epoch, PROGRAMS)


@dataclass
class _Memory:
    """What the ranks of a group see of each other: flags, partials and results."""

    group: dist.ProcessGroup
    device: torch.device
    capacity: int
    """fp32 elements of a partial."""

    def __post_init__(self) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        size = dist.get_world_size(self.group)
        numel = 2 * size * _PROGRAMS + 2 * self.capacity + self.capacity // 2
        torch.cuda.synchronize(self.device)
        self.own = symmetric.empty(numel, dtype=torch.int32, device=self.device)
        self.own.zero_()
        torch.cuda.synchronize(self.device)  # the flags are 0 before anybody may set one
        self.handle = symmetric.rendezvous(self.own, self.group)
        pointers = [self.handle.get_buffer(r, (1,), torch.int32).data_ptr() for r in range(size)]
        self.pointers = torch.tensor(pointers, dtype=torch.int64, device=self.device)
        self.epochs = torch.zeros(_PROGRAMS, dtype=torch.int32, device=self.device)
        dist.barrier(self.group)


def _block(numel: int, size: int) -> tuple[int, int]:
    """(elements of a block, warps) for so many elements of a rank."""
    if numel <= _ONE_SHOT_ELEMENTS:
        return _BLOCK, 4
    return triton.next_power_of_2(_LARGE_BLOCK // size), 16


@dataclass
class Peers:
    """The GPUs of a group, which can read each other's memory."""

    group: dist.ProcessGroup
    device: torch.device
    memories: list[_Memory] = field(default_factory=list)
    """Growing; a CUDA graph may hold an earlier one."""

    def sum(self, partial: Tensor, dtype: torch.dtype, tree: bool) -> Tensor:
        """The ranks' partials added up in fp32, on every rank: partial's shape in dtype."""
        output = torch.empty(partial.shape, dtype=dtype, device=partial.device)
        small = partial.numel() <= _ONE_SHOT_ELEMENTS
        self._launch(partial, output, _ONE_SHOT if small else _TWO_SHOTS, tree)
        return output

    def sum_of_own_rows(self, partial: Tensor, dtype: torch.dtype, tree: bool) -> Tensor:
        """The same sum, of this rank's part of the rows only: [T, ...] -> [T / size, ...]."""
        rows = len(partial) // dist.get_world_size(self.group)
        output = torch.empty((rows, *partial.shape[1:]), dtype=dtype, device=partial.device)
        self._launch(partial, output, _OWN_PART, tree)
        return output

    def gather_columns(self, x: Tensor) -> Tensor:
        """Every rank's columns [T, C] fp32, side by side in rank order: [T, size * C]."""
        (num_rows, width), size = x.shape, dist.get_world_size(self.group)
        output = torch.empty(num_rows, size * width, dtype=x.dtype, device=x.device)
        most = max(1, _MOST_GATHERED // width)
        for part, target in zip(x.contiguous().split(most), output.split(most), strict=True):
            memory, (block, num_warps) = self._memory(part.numel()), _block(part.numel(), size)
            _gather_kernel[(min(_PROGRAMS, len(part) * triton.cdiv(width, block)),)](
                part=part, output=target, memories=memory.pointers, epochs=memory.epochs,
                rows=len(part), width=width, capacity=memory.capacity,
                RANK=dist.get_rank(self.group), SIZE=size, PROGRAMS=_PROGRAMS, BLOCK=block,
                num_warps=num_warps,
            )  # fmt: skip
        return output

    def _launch(self, partial: Tensor, output: Tensor, mode: tl.constexpr, tree: bool) -> None:
        numel, size = partial.numel(), dist.get_world_size(self.group)
        if numel == 0:
            return
        memory, part = self._memory(numel), -(-numel // size)
        if mode is not _OWN_PART:
            part += -part % 16  # parts that loads of 16 bytes may start at
        block, num_warps = _block(numel, size)
        _sum_kernel[(min(_PROGRAMS, triton.cdiv(part, block)),)](
            partial=partial.contiguous(), output=output, memories=memory.pointers,
            epochs=memory.epochs, numel=numel, part=part, capacity=memory.capacity,
            RANK=dist.get_rank(self.group), SIZE=size, MODE=mode.value, TREE=tree,
            PROGRAMS=_PROGRAMS, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip

    def _memory(self, numel: int) -> _Memory:
        if not self.memories or self.memories[-1].capacity < numel:
            capacity = max(_LEAST_CAPACITY, triton.next_power_of_2(numel))
            self.memories.append(_Memory(self.group, self.device, capacity))
        return self.memories[-1]


_peers: dict[dist.ProcessGroup, Peers | None] = {}


def peers_of(group: dist.ProcessGroup, device: torch.device) -> Peers | None:
    """The group's GPUs; None unless every one of them can read every other one's memory."""
    if group not in _peers:
        index = device.index if device.index is not None else torch.cuda.current_device()
        host = hashlib.blake2b(socket.gethostname().encode(), digest_size=7).digest()
        places = _told((int.from_bytes(host), index), group, device)
        hosts, devices = {host for host, _ in places}, {i for _, i in places}
        # A process that sees its own GPU alone cannot say which one that is.
        told_apart = len(hosts) == 1 and len(devices) == len(places)
        connected = told_apart and all(
            torch.cuda.can_device_access_peer(index, other) for other in devices - {index}
        )
        agreed = all(theirs for (theirs,) in _told((connected,), group, device))
        _peers[group] = Peers(group, device) if agreed else None
    return _peers[group]


def _told(
    numbers: tuple[int, ...], group: dist.ProcessGroup, device: torch.device
) -> list[tuple[int, ...]]:
    """Every rank's numbers, in rank order; by way of the host where the group reaches it."""
    where = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device
    own = torch.tensor(numbers, dtype=torch.int64, device=where)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return [tuple(part.tolist()) for part in parts]
