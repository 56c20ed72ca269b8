"""The allocator of releasable device memory, over a CUDA driver that is the host's memory."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from samebit.kernels.gpu.vmm import OutOfPagesError, Vmm, VmmError, build

MIB = 1 << 20
FAKE = Path(__file__).resolve().parents[1] / "programs" / "fake_cuda.c"


class Driver:
    """The figures that the driver keeps."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def __getattr__(self, name: str) -> int:
        return ctypes.c_size_t.in_dll(self._library, f"fake_{name}").value

    def set(self, name: str, value: int) -> None:
        ctypes.c_size_t.in_dll(self._library, f"fake_{name}").value = value

    def fail_at(self, number: int) -> None:
        """Have the number-th of the coming calls of cuMemMap fail."""
        ctypes.c_int.in_dll(self._library, "fake_calls").value = 0
        ctypes.c_int.in_dll(self._library, "fake_fail_at").value = number


class Pool:
    """A pool of the allocator, called as torch calls it."""

    def __init__(self, vmm: Vmm) -> None:
        self.vmm, self.number = vmm, vmm.take()
        library = ctypes.CDLL(str(vmm.path))
        self._alloc, self._free = (getattr(library, name) for name in vmm.functions(self.number))
        self._alloc.restype = ctypes.c_void_p
        self._alloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        self._free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

    def alloc(self, size: int, device: int = 0) -> int | None:
        return self._alloc(size, device, None)

    def free(self, address: int) -> None:
        self._free(address, 0, 0, None)

    def bytes(self) -> tuple[int, int]:
        return self.vmm.num_bytes(self.number), self.vmm.num_bytes(self.number, mapped=True)


def resident(address: int, size: int) -> bool:
    """Whether the first page of a mapping can be written."""
    ctypes.memset(address, 7, size)
    return ctypes.string_at(address, 1) == b"\7"


@pytest.fixture
def driver_path(tmp_path: Path) -> Path:
    return build(FAKE)


@pytest.fixture
def vmm(driver_path: Path, tmp_path: Path) -> Vmm:
    # A copy has variables of its own.
    copy = tmp_path / "vmm.so"
    copy.write_bytes(build().read_bytes())
    return Vmm(copy, str(driver_path))


@pytest.fixture
def driver(vmm: Vmm, driver_path: Path):
    found = Driver(driver_path)
    before = found.reserved
    yield found
    found.fail_at(0)
    found.set("limit", 1 << 40)
    assert found.created == 0
    assert found.reserved == before, "a test leaves addresses behind"


def test_the_allocator_compiles_without_a_warning(tmp_path):
    from samebit.kernels.gpu import vmm as module

    command = ["gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC"]
    command += [f"-I{module._INCLUDE}", str(module._SOURCE), "-o", str(tmp_path / "vmm.so")]
    subprocess.run(command, check=True)


def test_pages_go_and_come_back_at_the_same_address(vmm, driver):
    pool, other = Pool(vmm), Pool(vmm)
    before = driver.mapped
    first, second, apart = pool.alloc(5 * MIB), pool.alloc(1), other.alloc(MIB)
    assert pool.bytes() == (8 * MIB, 8 * MIB)  # in steps of 2 MiB
    assert driver.mapped - before == 10 * MIB
    assert vmm.segments(pool.number) == sorted([(first, 6 * MIB), (second, 2 * MIB)])
    ctypes.memset(first, 5, MIB)

    vmm.release(pool.number)
    assert pool.bytes() == (8 * MIB, 0)
    assert driver.mapped - before == 2 * MIB, "the other pool's stay"
    vmm.release(pool.number)  # nothing is left to do
    assert driver.mapped - before == 2 * MIB

    vmm.resume(pool.number)
    vmm.resume(pool.number)
    assert driver.mapped - before == 10 * MIB
    assert ctypes.string_at(first, 1) == b"\0", "the old content is gone"
    assert resident(first, 6 * MIB)
    for address in (first, second):
        pool.free(address)
    other.free(apart)
    assert driver.mapped == before


def test_a_resume_that_fails_maps_nothing_and_can_be_repeated(vmm, driver):
    pool, before = Pool(vmm), driver.mapped
    addresses = [pool.alloc(2 * MIB) for _ in range(3)]
    vmm.release(pool.number)
    for number in (1, 2, 3):
        driver.fail_at(number)
        with pytest.raises(OutOfPagesError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            vmm.resume(pool.number)
        assert pool.bytes() == (6 * MIB, 0)
        assert driver.mapped == before
    driver.fail_at(0)
    driver.set("limit", before + 5 * MIB)
    with pytest.raises(OutOfPagesError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        vmm.resume(pool.number)
    assert driver.mapped == before
    driver.set("limit", before + 6 * MIB)
    vmm.resume(pool.number)
    assert all(resident(address, 2 * MIB) for address in addresses)
    for address in addresses:
        pool.free(address)


def test_only_a_lack_of_memory_is_told_as_one(vmm, driver):
    pool = Pool(vmm)
    address = pool.alloc(2 * MIB)
    vmm.release(pool.number)
    driver.set("error", 700)
    driver.fail_at(1)
    with pytest.raises(VmmError, match="pages were not had again: an unknown error"):
        vmm.resume(pool.number)
    driver.set("error", 2)
    assert pool.bytes() == (2 * MIB, 0)
    pool.free(address)


def test_a_device_that_cannot_is_told(vmm, driver):
    vmm.require_able(0)
    driver.set("able", 0)
    with pytest.raises(VmmError, match="GPU 0 has no releasable memory: .*virtual memory"):
        vmm.require_able(0)
    driver.set("able", 1)
    with pytest.raises(VmmError, match="GPU 3 has no releasable memory: an unknown error"):
        vmm.require_able(3)


def test_segments_that_stayed_mapped_survive_a_failed_resume(vmm, driver):
    pool = Pool(vmm)
    released = pool.alloc(2 * MIB)
    vmm.release(pool.number)
    mapped = pool.alloc(2 * MIB)
    driver.fail_at(1)
    with pytest.raises(OutOfPagesError):
        vmm.resume(pool.number)
    assert pool.bytes() == (4 * MIB, 2 * MIB)
    assert resident(mapped, 2 * MIB)
    pool.free(mapped)
    pool.free(released)


def test_an_allocation_that_fails_is_null_and_leaves_nothing(vmm, driver):
    pool, before = Pool(vmm), (driver.mapped, driver.reserved)
    driver.fail_at(1)
    assert pool.alloc(2 * MIB) is None
    assert pool.alloc(2 * MIB, device=3) is None, "there is no such device"
    driver.set("limit", driver.mapped)
    assert pool.alloc(2 * MIB) is None
    assert pool.bytes() == (0, 0)
    assert (driver.mapped, driver.reserved) == before


def test_freed_memory_is_unmapped_behind_a_synchronisation_and_once(vmm, driver):
    pool, before = Pool(vmm), driver.mapped
    address = pool.alloc(MIB)
    waited = driver.synchronized & 0xFFFFFFFF
    driver.set("context", 7)  # the thread is on another device
    pool.free(address)
    assert (driver.synchronized_in, driver.context) == (100, 7)
    assert driver.mapped == before
    assert (driver.synchronized & 0xFFFFFFFF) == waited + 1
    address = pool.alloc(MIB)
    vmm.release(pool.number)
    pool.free(address)  # no pages: only its addresses
    assert driver.mapped == before
    assert pool.bytes() == (0, 0)


def test_a_pool_is_taken_again_once_it_is_given_back_and_empty(vmm, driver):
    pools = [Pool(vmm) for _ in range(64)]
    with pytest.raises(VmmError, match="all pools"):
        vmm.take()
    addresses = [pool.alloc(MIB) for pool in pools]
    vmm.give(pools[5].number)
    with pytest.raises(VmmError, match="all pools"):
        vmm.take()
    for pool, address in zip(pools, addresses, strict=True):
        assert vmm.segments(pool.number) == [(address, 2 * MIB)]
        pool.free(address)
    assert vmm.take() == pools[5].number


def test_without_a_driver_or_a_compiler_the_reason_is_told(tmp_path, monkeypatch):
    with pytest.raises(VmmError, match="driver cannot be used: .*no_such_library"):
        Vmm(build(), "no_such_library.so")
    source = tmp_path / "broken.c"
    source.write_text("#error nothing is right\n")
    with pytest.raises(VmmError, match="nothing is right"):
        build(source)
    monkeypatch.setenv("CC", str(tmp_path / "no compiler"))
    with pytest.raises(VmmError, match="no compiler"):
        build(source)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VmmError, match="name one in the environment variable CC"):
        build(source)
