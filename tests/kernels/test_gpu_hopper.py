"""Attention on Hopper: the bits of the portable kernels, whatever lies around the contexts."""

import pytest
import torch

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_inputs import attention_inputs
from samebit.kernels.attention_kind import Heads
from samebit.kernels.gpu import attention as gpu
from samebit.kernels.gpu import decode_attention, hopper_decode
from samebit.kernels.rope import rope_table

pytestmark = pytest.mark.gpu

HEADS = {"8 of 4x128": Heads(32, 8, 128, 128**-0.5), "3 of 3x64": Heads(9, 3, 64, 0.125)}
PACKS = ([128], [512] * 3, [1000, 37, 2048, 129], [3000, 65, 1024, 1025, 1023])


@pytest.fixture
def portable(monkeypatch):
    """A function that calls another with the portable kernel in the Hopper one's place."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "fits", lambda *_: False)
            return function()

    return call


def taken(monkeypatch):
    """Count what goes to the Hopper kernel."""
    calls, run = [], gpu.prefill_attention
    monkeypatch.setattr(gpu, "prefill_attention", lambda *args: (calls.append(1), run(*args))[1])
    return calls


needs_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="the kernel is for Hopper",
)


@needs_hopper
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lens", PACKS, ids=str)
def test_packed(heads, lens, portable, monkeypatch):
    """Outputs and log-sum-exps, of views into one tensor of queries, keys and values."""
    kind = CanonicalAttention(heads, torch.device("cuda"))
    sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
    qkv = torch.randn(sum(lens), sum(sizes), heads.head_dim, device="cuda").bfloat16()
    q, k, v = qkv.split(sizes, 1)
    plan = kind.plan_packed(lens)
    calls = taken(monkeypatch)
    found = gpu.attend(q, k, v, plan, heads.scale)
    assert calls
    truth = portable(lambda: gpu.attend(q, k, v, plan, heads.scale))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def scattered(lens, page_size, heads):
    """(page table, caches) of random contexts; every other slot of the cache is NaN."""
    counts = [-(-n // page_size) for n in lens]
    table = torch.zeros(len(lens), max(counts), dtype=torch.int64)
    shape = (2, sum(counts), page_size, heads.num_kv_heads, heads.head_dim)
    caches = torch.full(shape, float("nan"), device="cuda").bfloat16()
    pages = torch.randperm(sum(counts)).split(counts)
    for row, own, length in zip(table, pages, lens, strict=True):
        row[: len(own)] = own
        place = torch.arange(length)
        values = torch.randn(2, length, *shape[3:], device="cuda").bfloat16()
        caches[:, row[place // page_size], place % page_size] = values
    return table, caches


@needs_hopper
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_paged(heads, page_size, portable, monkeypatch):
    """Chunks of contexts that end anywhere in a page."""
    kind = CanonicalAttention(heads, torch.device("cuda"))
    lens, new = [200, 1500, 3000, 128, 129, 1025, 700], [130, 1500, 300, 128, 129, 65, 512]
    table, caches = scattered(lens, page_size, heads)
    q = torch.randn(sum(new), heads.num_heads, heads.head_dim, device="cuda").bfloat16()
    plan = kind.plan_step(new, lens, table, page_size)
    calls = taken(monkeypatch)
    found = kind.attend(q, *caches, plan)
    assert calls
    assert not found.isnan().any()
    assert torch.equal(found, portable(lambda: kind.attend(q, *caches, plan)))


@needs_hopper
@pytest.mark.parametrize(
    ("heads", "page_size"),
    [(HEADS["8 of 4x128"], n) for n in (16, 64, 256)] + [(HEADS["3 of 3x64"], 64)],
)
@pytest.mark.parametrize("most", [1, 4])
def test_decode(heads, page_size, most, monkeypatch):
    """Contexts that end on and beside the edges of tiles and splits, with up to so many queries."""
    kind = CanonicalAttention(heads, torch.device("cuda"))
    edges = [n + d for n in (16, 64, 128, 256, 1024, 1152, 2048) for d in (-1, 0, 1, 8)]
    lens = [*range(1, 140), *edges, *edges[::-1], 2900, 5000]
    new = [min(n, 1 + i % most) for i, n in enumerate(lens)]
    table, caches = scattered(lens, page_size, heads)
    q = torch.randn(sum(new), heads.num_heads, heads.head_dim, device="cuda").bfloat16()
    plan = kind.plan_step(new, lens, table, page_size)
    calls, run = [], decode_attention.own_attention
    monkeypatch.setattr(
        decode_attention, "own_attention", lambda *args: (calls.append(1), run(*args))[1]
    )
    with monkeypatch.context() as patch:
        patch.setattr(hopper_decode, "_MOST_SPLITS", 9)
        found = kind.attend(q, *caches, plan)
    assert calls
    monkeypatch.setattr(decode_attention, "fits", lambda *_: False)
    assert not found.isnan().any()
    assert torch.equal(found, kind.attend(q, *caches, plan))


@needs_hopper
@pytest.mark.parametrize(("queries", "shares"), [(1, False), (4, False), (1, True), (4, True)])
def test_decode_without_a_pause(queries, shares, monkeypatch):
    """The kernel before writes the newest keys and lets this one begin early; again and again, in a
    graph too. Contexts may begin with the same 256 tokens."""
    heads, device, page_size = HEADS["8 of 4x128"], torch.device("cuda"), 64
    together, alone = (CanonicalAttention(heads, device) for _ in range(2))
    together.least_shared_bytes, alone.least_shared_bytes = 1, None
    lens = [*range(257 + queries, 600, 4)] if shares else [*range(queries, 300, 4)]
    table, caches = scattered(lens, page_size, heads)
    if shares:
        table[:, :4] = table[-1, :4]
    positions = torch.tensor(lens)[:, None] - queries + torch.arange(queries)
    pages = table.gather(1, positions // page_size)
    slots = (pages * page_size + positions % page_size).flatten().to(device)
    positions = positions.flatten().to(device)
    rotations = rope_table(128, 10000.0, 1024, device=device)
    step = [queries] * len(lens), lens, table, page_size
    plan = together.plan_step(*step)
    assert (plan.decode[0].prefixes is not None) == shares
    inputs = [torch.randn(len(slots), 48 * 128, device=device).bfloat16() for _ in range(5)]

    def attend(qkv, kind=together, plan=plan):
        q = attention_inputs(qkv, None, 1e-6, rotations, positions, slots, *caches)
        return kind.attend(q, *caches, plan)

    with monkeypatch.context() as patch:
        patch.setattr(decode_attention, "fits", lambda *_: False)
        truths = [attend(qkv, alone, alone.plan_step(*step)) for qkv in inputs]
    found = [attend(inputs[i % 5]) for i in range(300)]
    assert all(torch.equal(one, truths[i % 5]) for i, one in enumerate(found))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [attend(inputs[i % 5]) for i in range(50)]
    for _ in range(10):
        for one in found:
            one.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(one, truths[i % 5]) for i, one in enumerate(found))


@needs_hopper
def test_a_draft_reads_nothing_ahead(monkeypatch):
    """Its samples write places that they share: keys are read once the kernel before is done."""
    heads, device, page_size = HEADS["8 of 4x128"], torch.device("cuda"), 64
    kind, lens = CanonicalAttention(heads, device), [256, *[300] * 40]
    kind.reads_ahead, kind.least_shared_bytes = False, 1
    table, caches = scattered(lens, page_size, heads)
    table[:, :4] = table[-1, :4]
    last = torch.tensor(lens) - 1
    pages = table[torch.arange(len(lens)), last // page_size]
    slots = (pages * page_size + last % page_size).to(device)
    rotations = rope_table(128, 10000.0, 1024, device=device)
    plan = kind.plan_step([1] * len(lens), lens, table, page_size)
    assert plan.decode[0].prefixes is not None
    inputs = [torch.randn(len(lens), 48 * 128, device=device).bfloat16() for _ in range(5)]

    def attend(qkv, wait=False):
        q = attention_inputs(qkv, None, 1e-6, rotations, last.to(device), slots, *caches)
        if wait:
            torch.cuda.synchronize()
        return kind.attend(q, *caches, plan)

    truths = [attend(qkv, wait=True) for qkv in inputs]
    found = [attend(inputs[i % 5]) for i in range(300)]
    assert all(torch.equal(one, truths[i % 5]) for i, one in enumerate(found))


def test_caches_of_unequal_strides_are_refused():
    """A copy of one would be written by the kernel before."""
    heads, device = HEADS["8 of 4x128"], torch.device("cuda")
    kind = CanonicalAttention(heads, device)
    keys = torch.zeros(2, 64, 8, 128, device=device).bfloat16()
    values = torch.zeros(2, 64, 8, 256, device=device).bfloat16()[..., :128]
    plan = kind.plan_step([1], [3], torch.zeros(1, 1, dtype=torch.int64), 64)
    q = torch.zeros(1, 32, 128, device=device).bfloat16()
    with pytest.raises(ValueError, match="caches of keys and values have the strides"):
        kind.attend(q, keys, values, plan)
