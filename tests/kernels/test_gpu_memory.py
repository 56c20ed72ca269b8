"""Arena on a GPU: pages really go back to the device, and graphs captured over them stay valid."""

import gc

import pytest
import torch
from helpers import assert_same_bits

from samebit.kernels.gpu.vmm import VmmError
from samebit.kernels.memory import Arena, ResumeError

pytestmark = pytest.mark.gpu

MIB, GIB = 1 << 20, 1 << 30


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


@pytest.fixture
def arena():
    gc.collect()
    torch.cuda.empty_cache()
    made = Arena(torch.device("cuda", torch.cuda.current_device()))
    yield made
    made.resume()


def buffer(arena, tag="kv_cache", num_bytes=GIB):
    [tensor] = arena.allocate(tag, {"a": ((num_bytes // 4,), torch.int32)}).values()
    return tensor


def test_pages_go_back_to_the_device_and_come_again(arena):
    tensor, other = buffer(arena), buffer(arena, "weights", 8 * MIB).fill_(7)
    address, full = tensor.data_ptr(), free_bytes()
    assert arena.release(["kv_cache"]) == {"kv_cache": GIB}
    assert free_bytes() - full == GIB
    assert arena.occupation()["kv_cache"] == (0, GIB)
    assert arena.release(["kv_cache"]) == {"kv_cache": 0}
    assert arena.resume(["kv_cache"]) == {"kv_cache": GIB}
    assert arena.resume(["kv_cache"]) == {"kv_cache": 0}
    assert free_bytes() == full
    assert int(other.min()) == 7
    assert tensor.data_ptr() == address
    assert int(tensor.fill_(3).sum()) == 3 * len(tensor)


def test_kept_contents_come_back_to_the_bit(arena):
    """More than a piece of host memory, and small tensors of torch's own in the same tag."""
    tensor = buffer(arena, "optimizer", GIB + 24 * MIB)
    with arena.allocating("optimizer"):
        own = [torch.randn(n, device=arena.device) for n in (3, 1 << 10, 1 << 22)]
    arena.hold("optimizer", own)
    for seed in range(2):
        tensor.random_(generator=torch.Generator(arena.device).manual_seed(seed))
        before = [x.clone() for x in (tensor, *own)]
        arena.release(["optimizer"], keep=["optimizer"])
        arena.resume(["optimizer"])
        for found, expected in zip((tensor, *own), before, strict=True):
            assert_same_bits(found, expected)


def test_a_graph_survives_the_release_of_its_pool_and_of_its_inputs(arena):
    x = buffer(arena, "weights", 4 * MIB).fill_(1)
    out = torch.zeros(1, dtype=torch.int64, device=arena.device)

    def work() -> None:
        torch.sum(x * 2 + torch.zeros_like(x), 0, keepdim=True, out=out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # whoever fills the operands
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=arena.graph_pool("cuda_graphs"), stream=stream):
        work()
    assert arena.num_bytes("cuda_graphs") > 0
    for value in (3, 5):
        done = arena.release(["weights", "cuda_graphs"])
        assert all(done.values())
        arena.resume()
        x.fill_(value)
        graph.replay()
        assert int(out) == 2 * value * len(x)


def test_a_resume_without_room_is_told_and_repeated(arena):
    tensor, size = buffer(arena, num_bytes=2 * GIB).fill_(1), 2 * GIB
    arena.release(["kv_cache"])
    hog = torch.empty(free_bytes() - GIB, dtype=torch.uint8, device=arena.device)
    for _ in range(2):
        with pytest.raises(
            ResumeError, match=rf"2\.00 GiB \({size} bytes\) of tag kv_cache .*free"
        ):
            arena.resume()
        assert arena.released == ("kv_cache",)
        assert arena.occupation() == {"kv_cache": (0, size)}
    del hog
    # torch still caches the memory: resume has it freed.
    assert arena.resume() == {"kv_cache": size}
    assert int(tensor.fill_(3).min()) == 3


def test_an_allocation_without_room_is_torchs_error(arena):
    before = free_bytes()
    with pytest.raises(torch.OutOfMemoryError):
        buffer(arena, num_bytes=torch.cuda.mem_get_info()[1] + GIB)
    assert arena.num_bytes("kv_cache") == 0
    assert free_bytes() >= before
    buffer(arena, num_bytes=4 * MIB).fill_(1)


def test_what_is_made_elsewhere_is_not_held(arena):
    arena.hold("gradients", [torch.empty(0, device=arena.device)])
    with pytest.raises(VmmError, match="lies outside the pool"):
        arena.hold("gradients", [torch.zeros(MIB, device=arena.device)])


def test_what_nobody_refers_to_goes_back():
    """Over more arenas than there are pools."""
    device = torch.device("cuda", torch.cuda.current_device())
    before = None
    for _ in range(70):
        arena = Arena(device)
        kept = buffer(arena, num_bytes=64 * MIB).fill_(1)
        del arena
        assert int(kept.min()) == 1, "a view outlives its arena"
        del kept
        before = before or free_bytes()
    torch.cuda.empty_cache()
    assert free_bytes() >= before


def test_an_arena_of_ordinary_memory_needs_no_pool():
    arena = Arena(torch.device("cuda", torch.cuda.current_device()), releasable=False)
    assert int(buffer(arena, num_bytes=MIB).fill_(2).min()) == 2
    assert arena.num_bytes("kv_cache") == MIB
    assert arena.graph_pool("cuda_graphs") != arena.graph_pool("cuda_graphs")
