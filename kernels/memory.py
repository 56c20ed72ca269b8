"""Arena: memory by tag that is given back and resumed at the same addresses.

Views of the memory, and CUDA graphs captured over it, stay valid: only its pages come and go. On
GPUs that is CUDA's virtual memory behind torch's MemPool (gpu/vmm.py), on a CPU madvise.
"""

import ctypes
import mmap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

TAGS = ("weights", "kv_cache", "cuda_graphs", "draft", "gradients", "optimizer")
_ALIGNMENT = 512  # bytes, between the buffers of one allocation
_HOST_PIECE = 1 << 30  # bytes; torch rounds pinned allocations up to powers of two


class ReleasedError(RuntimeError):
    """Memory that is needed is released, or memory that cannot be released was to be."""


class ResumeError(RuntimeError):
    """A tag's pages do not fit into the free memory; it is still released and may be retried."""


class TagBytes(NamedTuple):
    """What a tag takes."""

    resident: int
    """Bytes that have pages; on a CPU what was not given back, which nothing measures."""
    reserved: int
    """Bytes of its addresses, with or without pages."""


class Memory(Protocol):
    """One tag's memory: what an arena asks of it."""

    def allocate(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, uninitialised."""

    def allocating(self) -> AbstractContextManager[None]:
        """What this thread allocates by torch in the block lies in it."""

    def hold(self, tensors: list[Tensor]) -> None:
        """Take in what was allocated in `allocating`."""

    def segments(self) -> list[Tensor]:
        """All of it, as uint8 tensors."""

    def num_bytes(self) -> int:
        """Bytes of its addresses."""

    def resident_bytes(self) -> int:
        """Bytes of its addresses that have pages."""

    def unmap(self) -> None:
        """Give its pages back."""

    def map(self) -> None:
        """Have pages again; torch.OutOfMemoryError, and none, where too few are free."""


class HostMemory:
    """Memory of the CPU: anonymous mappings, and the whole pages of tensors that torch made."""

    def __init__(self) -> None:
        self._segments: list[Tensor] = []
        self._mapped = True

    def allocate(self, num_bytes: int) -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._segments.append(
            torch.frombuffer(mmap.mmap(-1, max(1, num_bytes), flags), dtype=torch.uint8)
        )
        return self._segments[-1][:num_bytes]

    def allocating(self) -> AbstractContextManager[None]:
        """The CPU's allocator cannot be led: see `hold`."""
        return nullcontext()

    def hold(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            whole = tensor.detach().view(-1).view(torch.uint8)
            start = -whole.data_ptr() % mmap.PAGESIZE
            num_bytes = (len(whole) - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if num_bytes > 0:
                self._segments.append(whole[start : start + num_bytes])

    def segments(self) -> list[Tensor]:
        return self._segments

    def num_bytes(self) -> int:
        return sum(map(len, self._segments))

    def resident_bytes(self) -> int:
        return self.num_bytes() if self._mapped else 0

    def unmap(self) -> None:
        for segment in self._segments:
            give_back(segment.data_ptr(), len(segment))
        self._mapped = False

    def map(self) -> None:
        """The system gives zeroed pages where they are touched."""
        self._mapped = True


class PlainMemory:
    """Ordinary memory of a GPU, for an arena that is not to be releasable."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []

    def allocate(self, num_bytes: int) -> Tensor:
        self._buffers.append(torch.empty(num_bytes, dtype=torch.uint8, device=self._device))
        return self._buffers[-1]

    def allocating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def hold(self, tensors: list[Tensor]) -> None:
        self._buffers += tensors

    def segments(self) -> list[Tensor]:
        return self._buffers

    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    resident_bytes = num_bytes

    def unmap(self) -> None:
        """Its arena is not releasable."""

    def map(self) -> None:
        """As above."""


def give_back(address: int, num_bytes: int) -> None:
    """Give whole pages of the CPU's private memory back to the system; they read as zeros then."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)
    if libc.madvise(*place, mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise(MADV_DONTNEED) failed")


def require_tags(tags: object, known: Sequence[str]) -> None:
    """Raise ValueError for what is no list of known tags; it says the first wrong one."""
    unknown = [tags]
    if isinstance(tags, Collection) and not isinstance(tags, str):
        unknown = [tag for tag in tags if tag not in known]
    if unknown:
        raise ValueError(f"tags has {unknown[0]!r}; give a list of: {', '.join(known)}")


class Arena:
    """Buffers of one device by tag; a tag is what is released and resumed.

    releasable=False: ordinary memory, for which nothing needs to be compiled. One thread at a time
    may use it. Raises VmmError (gpu/vmm.py) when memory is first allocated on a GPU where there can
    be no releasable memory, and ValueError for unknown tags wherever one is given.
    """

    def __init__(self, device: torch.device, releasable: bool = True) -> None:
        self.device = device
        self.releasable = releasable
        self._memories: dict[str, Memory] = {}
        self._names: dict[str, set[str]] = {}
        self._backups: dict[str, _Backup] = {}
        self._released: dict[str, bool] = {}  # whether the content is kept

    # -- allocation ------------------------------------------------------------------------------

    def allocate(
        self, tag: str, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> dict[str, Tensor]:
        """Uninitialised buffers by name, given (shape, dtype): views of one flat allocation.

        Raises ValueError if the tag already has one of the names.
        """
        memory, known = self._memory(tag), self._names.setdefault(tag, set())
        if taken := sorted(known & set(shapes)):
            raise ValueError(f"buffer '{taken[0]}' of '{tag}' is allocated already")
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in shapes.values()]
        places = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        rest, made = memory.allocate(sum(places)), dict[str, Tensor]()
        for (name, (shape, dtype)), size, place in zip(shapes.items(), sizes, places, strict=True):
            made[name], rest = rest[:size].view(dtype).view(shape), rest[place:]
        known |= set(shapes)
        return made

    def adopt(self, tag: str) -> None:
        """Somebody else owns the tag's memory from here on: to release it does nothing."""
        self._require_known((tag,))
        self._memories.pop(tag, None)
        self._names.pop(tag, None)
        self._backups.pop(tag, None)
        self._released.pop(tag, None)

    @contextmanager
    def allocating(self, tag: str) -> Iterator[None]:
        """In the block this thread's torch allocations on a GPU lie in the tag's memory.

        A CPU's are found by `hold`. What is freed in it stays the tag's.
        """
        with self._memory(tag).allocating():
            yield

    def hold(self, tag: str, tensors: Iterable[Tensor]) -> None:
        """Have the tag release these tensors, contiguous ones of the device's type.

        On a GPU they have to be made in `allocating`; on a CPU they may come from anywhere.
        """
        self._memory(tag).hold(list(tensors))

    def graph_pool(self, tag: str) -> tuple[int, int]:
        """The tag's memory as the pool of torch.cuda.graph."""
        if not self.releasable:
            return torch.cuda.graph_pool_handle()
        from samebit.kernels.gpu.vmm import DevicePool

        memory = self._memory(tag)
        assert isinstance(memory, DevicePool), "CUDA graphs are of GPUs"
        return memory.graph_pool

    # -- release and resume ----------------------------------------------------------------------

    def release(
        self, tags: Sequence[str] | None = None, keep: Sequence[str] = ()
    ) -> dict[str, int]:
        """Give the tags' pages back (unset: all tags'); the bytes of each, 0 for nothing to do.

        Nothing may use the memory until it is resumed. The content is lost, but for the tags in
        `keep`: those are copied to host memory, pinned for a GPU, which is used again next time.
        Raises ReleasedError if the arena is not releasable.
        """
        given = self._given(tags)
        self._require_known(keep)
        self.require_releasable()
        self._synchronize()
        done = {}
        for tag in given:
            done[tag] = 0
            if (memory := self._memories.get(tag)) is None:
                continue
            if tag not in self._released:
                if tag in keep:
                    self._backups.setdefault(tag, _Backup(self.device)).save(memory.segments())
                    self._synchronize()
                self._released[tag] = tag in keep  # before a page goes, lest one be missing unknown
            done[tag] = memory.resident_bytes()
            memory.unmap()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return done

    def resume(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """Give the tags pages again (unset: all tags); the bytes of each, 0 for nothing to do.

        Raises ResumeError that names the first tag that does not fit; those before it are resumed,
        it and the later ones are as they were. After that, or an interruption, the call may be
        repeated.
        """
        done = {}
        for tag in self._given(tags):
            done[tag] = 0
            if tag not in self._released:
                continue
            memory = self._memories[tag]
            try:
                memory.map()
            except torch.OutOfMemoryError as error:
                raise ResumeError(self._does_not_fit(tag, memory)) from error
            if self._released[tag]:
                self._backups[tag].restore(memory.segments())
                self._synchronize()
            del self._released[tag]
            done[tag] = memory.resident_bytes()
        return done

    @property
    def released(self) -> tuple[str, ...]:
        """The tags whose pages are given back, in the order of TAGS."""
        return tuple(tag for tag in TAGS if tag in self._released)

    def require_resident(self, tags: Sequence[str] | None = None) -> None:
        """Raise ReleasedError if one of the tags (unset: of any) is released."""
        if missing := [tag for tag in self._given(tags) if tag in self._released]:
            raise ReleasedError(f"the memory of {', '.join(missing)} is released; resume it first")

    def require_releasable(self) -> None:
        """Raise ReleasedError for an arena of ordinary memory."""
        if not self.releasable:
            raise ReleasedError("memory cannot be released: it was allocated with releasable=false")

    def is_released(self, tag: str) -> bool:
        self._require_known((tag,))
        return tag in self._released

    def owns(self, tag: str) -> bool:
        """Whether the tag has memory of its own here."""
        self._require_known((tag,))
        return tag in self._memories

    def num_bytes(self, tag: str) -> int:
        """Bytes of the tag's addresses, released or not."""
        self._require_known((tag,))
        return self._memories[tag].num_bytes() if tag in self._memories else 0

    def occupation(self) -> dict[str, TagBytes]:
        """What each tag takes, of those that have memory."""
        found = {tag: self._memories[tag] for tag in TAGS if tag in self._memories}
        return {t: TagBytes(m.resident_bytes(), m.num_bytes()) for t, m in found.items()}

    # -- internals -------------------------------------------------------------------------------

    def _memory(self, tag: str) -> Memory:
        self._require_known((tag,))
        if tag not in self._memories:
            self._memories[tag] = self._new_memory()
        return self._memories[tag]

    def _new_memory(self) -> Memory:
        if self.device.type == "cpu":
            return HostMemory()
        if not self.releasable:
            return PlainMemory(self.device)
        from samebit.kernels.gpu.vmm import DevicePool

        return DevicePool(self.device)

    def _given(self, tags: Sequence[str] | None) -> Sequence[str]:
        if tags is None:
            return [tag for tag in TAGS if tag in self._memories]
        self._require_known(tags)
        return list(dict.fromkeys(tags))

    @staticmethod
    def _require_known(tags: Sequence[str]) -> None:
        require_tags(tags, TAGS)

    def _does_not_fit(self, tag: str, memory: Memory) -> str:
        wanted = memory.num_bytes() - memory.resident_bytes()
        free = "" if self.device.type == "cpu" else f", {self._free():.2f} GiB free"
        return (
            f"{wanted / 2**30:.2f} GiB ({wanted} bytes) of tag {tag} wanted{free}; it is still "
            "released: make room and resume it again"
        )

    def _free(self) -> float:
        return torch.cuda.mem_get_info(self.device)[0] / 2**30

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Backup:
    """A tag's content in the host's memory, which is kept and used again."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._host: dict[tuple[int, int], Tensor] = {}

    def save(self, segments: Sequence[Tensor]) -> None:
        """Start to copy all of it; pieces that no longer exist are forgotten."""
        host, self._host = self._host, {}
        for place, piece in _pieces(segments):
            if place not in host:
                host[place] = torch.empty(len(piece), dtype=torch.uint8, pin_memory=self._pinned)
            self._host[place] = host[place].copy_(piece, non_blocking=True)

    def restore(self, segments: Sequence[Tensor]) -> None:
        """Start to copy it back."""
        for place, piece in _pieces(segments):
            if place in self._host:
                piece.copy_(self._host[place], non_blocking=True)


def _pieces(segments: Sequence[Tensor]) -> Iterator[tuple[tuple[int, int], Tensor]]:
    for segment in segments:
        for piece in segment.split(_HOST_PIECE):
            yield (piece.data_ptr(), len(piece)), piece
