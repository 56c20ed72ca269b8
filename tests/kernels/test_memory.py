"""Arena on the CPU: pages really go back to the system, addresses and kept contents stay."""

import ctypes
import mmap

import pytest
import torch
from helpers import assert_same_bits

from samebit.kernels.memory import (
    TAGS,
    Arena,
    HostMemory,
    ReleasedError,
    ResumeError,
    _Backup,
)

CPU = torch.device("cpu")
MIB = 1 << 20


def resident_kib(tensor: torch.Tensor) -> int:
    """KiB of the pages over which the tensor lies and which the system holds in memory."""
    page = mmap.PAGESIZE
    start = tensor.data_ptr() // page * page
    num_bytes = tensor.data_ptr() + tensor.nbytes - start
    held = (ctypes.c_ubyte * -(-num_bytes // page))()
    place = ctypes.c_void_p(start), ctypes.c_size_t(num_bytes)
    assert ctypes.CDLL(None).mincore(*place, held) == 0
    return sum(x & 1 for x in held) * page // 1024


@pytest.fixture
def arena():
    return Arena(CPU)


def fill(arena, tag, num_bytes=8 * MIB):
    [tensor] = arena.allocate(tag, {"a": ((num_bytes,), torch.uint8)}).values()
    return tensor.fill_(7)


def interrupted_after(monkeypatch, owner, name, done=True):
    """Have a method raise KeyboardInterrupt, once its work is done or before; what undoes that."""
    own = getattr(owner, name)

    def method(*arguments):
        if done:
            own(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, method)
    return monkeypatch.undo


def test_buffers_are_aligned_views_of_one_allocation(arena):
    shapes = {
        "a": ((3, 5), torch.float32),
        "none": ((0, 4), torch.bfloat16),
        "b": ((7,), torch.bfloat16),
        "c": ((), torch.int64),
    }
    found = arena.allocate("weights", shapes)
    assert {name: (tuple(x.shape), x.dtype) for name, x in found.items()} == shapes
    assert all(x.is_contiguous() for x in found.values())
    places = [x.data_ptr() - found["a"].data_ptr() for x in (found["b"], found["c"])]
    assert places == [512, 1024]
    assert arena.num_bytes("weights") == 1536
    for i, x in enumerate(found.values()):
        x.fill_(i)
    assert [x.float().unique().tolist() for x in found.values()] == [[0], [], [2], [3]]


def test_a_buffer_is_allocated_once(arena):
    shape = ((2,), torch.float32)
    arena.allocate("kv_cache", {"a": shape})
    arena.allocate("weights", {"a": shape})
    with pytest.raises(ValueError, match="buffer 'a' of 'kv_cache' is allocated already"):
        arena.allocate("kv_cache", {"b": shape, "a": shape})
    arena.allocate("kv_cache", {"b": shape})


def test_released_pages_go_back_to_the_system(arena):
    tensor, other = fill(arena, "kv_cache"), fill(arena, "weights")
    address = tensor.data_ptr()
    assert resident_kib(tensor) >= 8 * 1024
    assert arena.release(["kv_cache"]) == {"kv_cache": 8 * MIB}
    assert resident_kib(tensor) == 0
    size = 8 * MIB
    assert arena.occupation() == {"weights": (size, size), "kv_cache": (0, size)}
    assert int(other.min()) == 7, "another tag's content stays"
    assert arena.resume(["kv_cache"]) == {"kv_cache": 8 * MIB}
    assert tensor.data_ptr() == address
    assert int(tensor.max()) == 0, "the content is lost"
    assert int(tensor.fill_(3).min()) == 3


def test_whole_pages_of_torchs_own_tensors_are_released(arena):
    """The ends of a tensor share their pages with others, and stay."""
    made = torch.full((9 * MIB + 100,), 7, dtype=torch.uint8)
    tensor = made[1:]
    with arena.allocating("gradients"):
        small = torch.full((40,), 7, dtype=torch.uint8)
    arena.hold("gradients", [tensor, small, made[:0]])
    held = arena.num_bytes("gradients")
    assert 9 * MIB - 4096 <= held <= 9 * MIB
    before = resident_kib(tensor)
    assert arena.release(["gradients"]) == {"gradients": held}
    assert before - resident_kib(tensor) == held // 1024
    assert int((tensor == 0).sum()) == held
    assert (int(made[0]), int(tensor[-1])) == (7, 7)
    assert small.tolist() == [7] * 40


def test_kept_contents_come_back_to_the_bit_in_every_cycle(arena):
    tensors = arena.allocate("optimizer", dict.fromkeys("ab", ((MIB + 3,), torch.float32)))
    memory, hosts = tensors["a"], set()
    for seed in range(3):
        for name, tensor in tensors.items():
            tensor.normal_(generator=torch.Generator().manual_seed(seed + ord(name)))
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        arena.release(["optimizer"], keep=["optimizer"])
        assert resident_kib(memory) == 0
        assert int(torch.count_nonzero(memory)) == 0
        arena.resume()
        for name, tensor in tensors.items():
            assert_same_bits(tensor, before[name])
        hosts.add(tuple(x.data_ptr() for x in arena._backups["optimizer"]._host.values()))
    assert len(hosts) == 1, "the host memory is used again"


def test_a_content_that_is_not_kept_is_not_restored_from_an_earlier_cycle(arena):
    tensor = fill(arena, "weights")
    arena.release(["weights"], keep=["weights"])
    arena.resume()
    assert int(tensor.min()) == 7
    arena.release(["weights"], keep=["kv_cache"])
    arena.resume()
    assert int(tensor.max()) == 0


def test_what_is_done_already_is_told_and_not_done_again(arena):
    tensor = fill(arena, "kv_cache")
    assert arena.resume(["kv_cache", "weights"]) == {"kv_cache": 0, "weights": 0}
    assert int(tensor.min()) == 7
    assert arena.release() == {"kv_cache": 8 * MIB}
    assert arena.released == ("kv_cache",)
    assert arena.release(["kv_cache"], keep=["kv_cache"]) == {"kv_cache": 0}
    assert arena.resume(["kv_cache", "kv_cache"]) == {"kv_cache": 8 * MIB}
    assert arena.resume() == {"kv_cache": 0}
    assert arena.released == ()


def test_a_resume_that_fails_names_tag_and_bytes_and_can_be_repeated(arena, monkeypatch):
    first, second, third = (fill(arena, tag) for tag in ("weights", "kv_cache", "draft"))
    arena.release(keep=["kv_cache", "draft"])
    own_map = HostMemory.map

    def fail_on_kv(memory):
        if memory is arena._memories["kv_cache"]:
            raise torch.OutOfMemoryError
        own_map(memory)

    monkeypatch.setattr(HostMemory, "map", fail_on_kv)
    for resumed in ([("weights", 8 * MIB)], [("weights", 0)]):
        with pytest.raises(ResumeError, match=r"0\.01 GiB \(8388608 bytes\) of tag kv_cache"):
            arena.resume()
        assert arena.released == ("kv_cache", "draft")
        assert [arena.is_released(tag) for tag in TAGS[:3]] == [False, True, False]
        assert arena.resume(["weights"]) == {"weights": 0}, resumed
    monkeypatch.undo()
    assert arena.resume() == {"weights": 0, "kv_cache": 8 * MIB, "draft": 8 * MIB}
    assert [int(x.min()) for x in (first, second, third)] == [0, 7, 7]


@pytest.mark.parametrize("again", ["resume", "release"])
def test_an_interrupted_resume_is_repeated_to_the_bit(arena, monkeypatch, again):
    tensor = fill(arena, "optimizer")
    arena.release(keep=["optimizer"])
    restore = interrupted_after(monkeypatch, _Backup, "restore", done=False)
    with pytest.raises(KeyboardInterrupt):
        arena.resume()
    assert arena.released == ("optimizer",)
    with pytest.raises(ReleasedError, match="memory of optimizer is released"):
        arena.require_resident()
    restore()
    if again == "release":
        assert arena.release(keep=["optimizer"]) == {"optimizer": 8 * MIB}
        assert resident_kib(tensor) == 0
    assert arena.resume() == {"optimizer": 8 * MIB}
    assert (int(tensor.min()), int(tensor.max())) == (7, 7)
    assert arena.released == ()


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_release_counts_as_released(arena, monkeypatch, kept):
    tensor = fill(arena, "optimizer")
    restore = interrupted_after(monkeypatch, HostMemory, "unmap")
    with pytest.raises(KeyboardInterrupt):
        arena.release(keep=["optimizer"] if kept else [])
    assert arena.released == ("optimizer",)
    restore()
    arena.resume()
    assert int(tensor.min()) == int(tensor.max()) == 7 * kept


def test_memory_is_not_said_to_be_short_for_another_error(arena, monkeypatch):
    fill(arena, "kv_cache")
    arena.release()

    def broken(_):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(HostMemory, "map", broken)
    with pytest.raises(RuntimeError, match="ILLEGAL_ADDRESS") as found:
        arena.resume()
    assert not isinstance(found.value, ResumeError)
    assert arena.released == ("kv_cache",)


def test_adopted_memory_is_not_released(arena):
    own = fill(arena, "weights")
    arena.adopt("weights")
    assert arena.release(["weights"]) == {"weights": 0}
    assert arena.num_bytes("weights") == 0
    assert not arena.owns("weights")
    assert int(own.min()) == 7
    arena.require_resident()


def test_released_memory_is_asked_for_by_name(arena):
    fill(arena, "weights")
    fill(arena, "kv_cache")
    arena.release(["kv_cache"])
    arena.require_resident(["weights"])
    for tags in (None, ["kv_cache"]):
        with pytest.raises(ReleasedError, match="memory of kv_cache is released"):
            arena.require_resident(tags)


@pytest.mark.parametrize(
    "call",
    [
        lambda arena, tags: arena.release(tags),
        lambda arena, tags: arena.release([], keep=tags),
        lambda arena, tags: arena.resume(tags),
        lambda arena, tags: arena.require_resident(tags),
        lambda arena, tags: arena.allocate(tags[0], {}),
        lambda arena, tags: arena.adopt(tags[0]),
        lambda arena, tags: arena.num_bytes(tags[0]),
        lambda arena, tags: arena.is_released(tags[0]),
    ],
)
def test_unknown_tags_are_refused_with_the_known_ones(arena, call):
    fill(arena, "weights")
    with pytest.raises(ValueError, match=f"tags has 'kv'; give a list of: {', '.join(TAGS)}"):
        call(arena, ["kv", "weights"])
    assert arena.released == ()


@pytest.mark.parametrize("wrong", ["weights", 7])
def test_what_is_no_list_of_tags_is_refused(arena, wrong):
    with pytest.raises(ValueError, match=f"tags has {wrong!r}; give a list"):
        arena.release(wrong)


def test_an_arena_of_ordinary_memory_refuses_to_release():
    arena = Arena(CPU, releasable=False)
    tensor = fill(arena, "weights")
    with pytest.raises(ReleasedError, match="allocated with releasable=false"):
        arena.release()
    assert int(tensor.min()) == 7
    assert arena.resume() == {"weights": 0}
