"""Device memory that gives its pages back and keeps its addresses, as pools of torch's allocator.

The allocator is vmm.c, compiled when it is first needed. It is no Python: torch calls it under the
lock of its own allocator, where waiting for the interpreter's lock could be for ever.
"""

import ctypes
import functools
import gc
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.build import platform_key
from triton.runtime.cache import get_cache_manager

_SOURCE = Path(__file__).with_name("vmm.c")
_INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
_FLAGS = ("-O2", "-shared", "-fPIC")
_NAME = "samebit_vmm.so"
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class VmmError(RuntimeError):
    """Releasable memory cannot be had, or the driver refused what should not fail."""


class OutOfPagesError(torch.OutOfMemoryError):
    """The device has too little free memory for a pool's pages."""


def build(source: Path = _SOURCE, include: Path = _INCLUDE) -> Path:
    """Compile a C file against cuda.h into Triton's cache, unless it is there; the library's path.

    Raises VmmError where there is no compiler, or for what the compiler says.
    """
    text = source.read_text()
    compiler = _compiler()
    said = "\0".join((text, platform_key(), *compiler, *_FLAGS))
    cache = get_cache_manager(hashlib.sha256(said.encode()).hexdigest())
    if (found := cache.get_file(_NAME)) is not None:
        return Path(found)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / _NAME
        command = [*compiler, *_FLAGS, f"-I{include}", str(source), "-o", str(library), "-ldl"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise VmmError(f"{shlex.join(command)} failed: {said.strip()}") from error
        return Path(cache.put(library.read_bytes(), _NAME, binary=True))


def _compiler() -> list[str]:
    """As Triton chooses it."""
    if named := os.environ.get("CC"):
        return shlex.split(named)
    if (found := shutil.which("gcc") or shutil.which("clang")) is None:
        raise VmmError(
            "releasable memory needs a C compiler, and there is no gcc or clang; install one, or "
            "name one in the environment variable CC"
        )
    return [found]


class Vmm:
    """The compiled allocator over a CUDA driver; raises VmmError if either is missing."""

    def __init__(self, path: Path, libcuda: str = "libcuda.so.1") -> None:
        self.path = path
        self._calls = calls = ctypes.CDLL(str(path))
        for call in (calls.samebit_vmm_open, calls.samebit_vmm_error, calls.samebit_vmm_why_not):
            call.restype = ctypes.c_char_p
        calls.samebit_vmm_bytes.restype = ctypes.c_uint64
        if (wrong := calls.samebit_vmm_open(libcuda.encode())) is not None:
            raise VmmError(f"the CUDA driver cannot be used: {wrong.decode()}")

    def require_able(self, device: int) -> None:
        """Raise VmmError for a device (its index) whose memory cannot be had so."""
        if (wrong := self._calls.samebit_vmm_why_not(device)) is not None:
            raise VmmError(f"GPU {device} has no releasable memory: {wrong.decode()}")

    def take(self) -> int:
        """The number of a pool that is empty and nobody's; VmmError if there is none."""
        if (pool := self._calls.samebit_vmm_take()) < 0:
            raise VmmError("all pools of releasable memory are in use; close engines or trainers")
        return pool

    def give(self, pool: int) -> None:
        """Hand back a pool; it is taken again once it is empty."""
        self._calls.samebit_vmm_give(pool)

    def release(self, pool: int) -> None:
        """Give the pages of a pool back; nothing may use them any more."""
        if result := self._calls.samebit_vmm_release(pool):
            raise VmmError(f"pages were not given back: {self._said(result)}")

    def resume(self, pool: int) -> None:
        """Give a pool pages again: all of them, or none and OutOfPagesError, or VmmError."""
        if (result := self._calls.samebit_vmm_resume(pool)) == _OUT_OF_MEMORY:
            raise OutOfPagesError(self._said(result))
        if result:
            raise VmmError(f"pages were not had again: {self._said(result)}")

    def num_bytes(self, pool: int, mapped: bool = False) -> int:
        """Bytes of a pool's addresses; `mapped`: of those that have pages."""
        return self._calls.samebit_vmm_bytes(pool, mapped)

    def segments(self, pool: int) -> list[tuple[int, int]]:
        """(address, bytes) of every range of a pool."""
        count = self._calls.samebit_vmm_segments(pool, None, None, 0)
        addresses, sizes = (ctypes.c_uint64 * count)(), (ctypes.c_uint64 * count)()
        self._calls.samebit_vmm_segments(pool, addresses, sizes, count)
        return sorted(zip(addresses, sizes, strict=True))

    def functions(self, pool: int) -> tuple[str, str]:
        """The names of the pool's functions that allocate and free, for torch."""
        return f"samebit_vmm_alloc_{pool:03o}", f"samebit_vmm_free_{pool:03o}"

    def _said(self, result: int) -> str:
        return self._calls.samebit_vmm_error(result).decode()


@functools.cache
def vmm() -> Vmm:
    """This process's allocator."""
    return Vmm(build())


@functools.cache
def _allocator(pool: int) -> torch.cuda.memory.CUDAPluggableAllocator:
    """Kept for ever: what torch frees late it frees by this."""
    made = vmm()
    return torch.cuda.memory.CUDAPluggableAllocator(str(made.path), *made.functions(pool))


class _Segment:
    """Device memory as torch.as_tensor takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class DevicePool:
    """A pool of one device's memory; VmmError where there can be none."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._vmm = vmm()
        self._vmm.require_able(index)
        self._number = self._free_number()
        weakref.finalize(self, self._vmm.give, self._number)
        with torch.cuda.device(index):
            self._pool = torch.cuda.MemPool(_allocator(self._number).allocator())

    def _free_number(self) -> int:
        try:
            return self._vmm.take()
        except VmmError:  # what is gone may not be collected, or torch may still cache its memory
            gc.collect()
            torch.cuda.empty_cache()
            return self._vmm.take()

    @property
    def graph_pool(self) -> tuple[int, int]:
        """What torch.cuda.graph takes as its pool."""
        return self._pool.id

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """What this thread allocates on the device in the block lies in the pool."""
        torch.cuda.empty_cache()  # in the block torch would not, where memory is short
        with torch.cuda.use_mem_pool(self._pool, self._device):
            yield

    def allocate(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, uninitialised."""
        with self.allocating():
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def hold(self, tensors: list[Tensor]) -> None:
        """They were allocated in the pool, or they are not releasable: VmmError."""
        ranges = self._vmm.segments(self._number)
        for tensor in tensors:
            at = tensor.data_ptr()
            if tensor.numel() and not any(start <= at < start + size for start, size in ranges):
                raise VmmError(f"{tuple(tensor.shape)} {tensor.dtype} lies outside the pool")

    def segments(self) -> list[Tensor]:
        """The pool's whole memory as uint8 tensors; it has to be resident."""
        with torch.cuda.device(self._device):
            return [
                torch.as_tensor(_Segment(*segment), device=self._device)
                for segment in self._vmm.segments(self._number)
            ]

    def num_bytes(self) -> int:
        return self._vmm.num_bytes(self._number)

    def resident_bytes(self) -> int:
        return self._vmm.num_bytes(self._number, mapped=True)

    def unmap(self) -> None:
        """Give the pages back; nothing on the device may use them any more."""
        self._vmm.release(self._number)

    def map(self) -> None:
        """Have pages at the same addresses again, or none and OutOfPagesError."""
        try:
            self._vmm.resume(self._number)
        except OutOfPagesError:
            torch.cuda.empty_cache()
            self._vmm.resume(self._number)
