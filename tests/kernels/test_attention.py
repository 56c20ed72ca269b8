"""One result for all: packed, chunked prefill over pages, and decode give the same bits."""

import pytest
import torch
from helpers import assert_same_bits, attention_of

from samebit.kernels.attention import attention_ref
from samebit.kernels.kv_write import kv_write

NAN = float("nan")
HEADS = ((4, 2, 16), (6, 2, 16), (8, 8, 20), (9, 3, 33), (5, 1, 8))
# Around every boundary of a 16-row tile, a 64-key tile and two of them.
LENS = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 150)
CHUNKS = (1, 13, 16, 17, 63, 64, 65)
PAGE_SIZES = (1, 16, 48, 64, 128)


def make_qkv(heads, lens, seed=0):
    num_heads, num_kv, head_dim = heads
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lens), n, head_dim) for n in (num_heads, num_kv, num_kv)]
    return [torch.randn(s, generator=generator) for s in shapes]


def packed(qkv, lens):
    q, k, v = qkv
    attention = attention_of(q, k)
    return attention.attend_packed(q, k, v, attention.plan_packed(lens))


class Pages:
    """A paged cache full of NaN, and one scrambled page table for `lens`."""

    def __init__(self, qkv, lens, page_size, seed=0, spare=3):
        self.q, self.k, self.v = (x.split(list(lens)) for x in qkv)
        self.lens, self.page_size = lens, page_size
        counts = [-(-n // page_size) for n in lens]
        total = sum(counts) + spare
        ids = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        self.table = torch.zeros(len(lens), max(counts), dtype=torch.int64)
        for i, n in enumerate(counts):
            self.table[i, :n] = torch.tensor([ids.pop() for _ in range(n)])
        shape = (total, page_size, *qkv[1].shape[1:])
        self.caches = [torch.full(shape, NAN) for _ in range(2)]
        self.done = [0] * len(lens)

    def step(self, which, counts):
        """The next `counts` tokens of the sequences `which`, in that order, as one batch."""
        spans = [(i, self.done[i], self.done[i] + n) for i, n in zip(which, counts, strict=True)]
        q, k, v = (torch.cat([x[i][a:b] for i, a, b in spans]) for x in (self.q, self.k, self.v))
        kv_slots = []
        for i, a, b in spans:
            p = torch.arange(a, b)
            kv_slots.append(
                self.table[i, p // self.page_size] * self.page_size + p % self.page_size
            )
            self.done[i] = b
        kv_write(k, v, *self.caches, torch.cat(kv_slots))
        attention, ends = attention_of(q, k), [b for _, _, b in spans]
        plan = attention.plan_step(counts, ends, self.table[list(which)], self.page_size)
        return attention.attend(q, *self.caches, plan).split(list(counts))

    def run(self, chunk):
        """Everything in chunks of `chunk`, all unfinished sequences in each batch."""
        parts = [[] for _ in self.lens]
        while left := [i for i, n in enumerate(self.lens) if self.done[i] < n]:
            counts = [min(chunk, self.lens[i] - self.done[i]) for i in left]
            for i, part in zip(left, self.step(left, counts), strict=True):
                parts[i].append(part)
        return torch.cat([part for of_seq in parts for part in of_seq])


def test_packed_is_attention():
    """The value itself: at most twice the error of plain torch fp32, against fp64."""
    for heads in HEADS:
        q, k, v = qkv = make_qkv(heads, LENS)
        scale = heads[2] ** -0.5
        exact = exact_attention(*(x.double() for x in qkv), LENS, scale)
        plain = attention_ref(q, k, v, LENS, scale)
        bar = 2 * (plain - exact).abs().max() + exact.abs().max() * 2.0**-24
        assert (packed(qkv, LENS) - exact).abs().max() <= bar, heads


def exact_attention(q, k, v, lens, scale):
    group, outputs = q.shape[1] // k.shape[1], []
    for parts in zip(*(x.split(list(lens)) for x in (q, k, v)), strict=True):
        for t in range(len(parts[0])):
            keys, values = (x[: t + 1].repeat_interleave(group, 1) for x in parts[1:])
            weights = ((parts[0][t] * keys).sum(-1) * scale).softmax(0)
            outputs.append((weights[..., None] * values).sum(0))
    return torch.stack(outputs)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_over_pages_are_the_packed_forward(heads, chunk):
    """Trainer equals rollout: packed training forward, chunked prefill and decode (chunk 1)."""
    qkv = make_qkv(heads, LENS)
    truth = packed(qkv, LENS)
    for page_size in (16, 48) if chunk == 1 else PAGE_SIZES:
        found = Pages(qkv, LENS, page_size, seed=page_size).run(chunk)
        assert_same_bits(found, truth, f"page size {page_size}")


def test_every_chunk_position_of_one_sequence():
    """Prefill to any length, then decode: every split point."""
    heads, lens = (4, 2, 16), (131,)
    qkv = make_qkv(heads, lens)
    truth = packed(qkv, lens)
    for split in range(1, 131):
        pages = Pages(qkv, lens, 16)
        first = pages.step([0], [split])
        second = pages.step([0], [131 - split])
        assert_same_bits(torch.cat([*first, *second]), truth, f"split at {split}")


def test_long_sequences_need_many_tiles():
    """Five key tiles, decode at the end and a chunk across the boundaries."""
    heads, lens = (6, 2, 16), (321, 320)
    qkv = make_qkv(heads, lens)
    truth = packed(qkv, lens).split(lens)
    pages = Pages(qkv, lens, 48)
    pages.step([0, 1], [250, 319])
    for i, n in ((1, 1), (0, 70), (0, 1)):
        [part] = pages.step([i], [n])
        end = pages.done[i]
        assert_same_bits(part, truth[i][end - n : end], (i, end))


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_neighbours_change_nothing(heads):
    """The same sequence alone, among others, and in another place."""
    qkv = make_qkv(heads, LENS)
    truth = packed(qkv, LENS).split(LENS)
    of_seq = [[x.split(LENS)[i] for x in qkv] for i in range(len(LENS))]
    for i, n in enumerate(LENS):
        assert_same_bits(packed(of_seq[i], (n,)), truth[i], f"length {n} alone")
    for seed in range(3):
        order = torch.randperm(len(LENS), generator=torch.Generator().manual_seed(seed)).tolist()
        joined = [torch.cat([of_seq[i][j] for i in order]) for j in range(3)]
        lens = [LENS[i] for i in order]
        for i, found in zip(order, packed(joined, lens).split(lens), strict=True):
            assert_same_bits(found, truth[i], f"order {seed}, length {LENS[i]}")


def test_prefill_and_decode_in_one_batch():
    """A step of mixed query lengths: one token here, a chunk there."""
    qkv = make_qkv((4, 2, 16), LENS)
    truth = packed(qkv, LENS).split(LENS)
    generator = torch.Generator().manual_seed(0)
    pages = Pages(qkv, LENS, 16)
    while left := [i for i, n in enumerate(LENS) if pages.done[i] < n]:
        keep = torch.randperm(len(left), generator=generator)[: 1 + len(left) // 2].tolist()
        which = [left[i] for i in keep]
        sizes = torch.randint(1, 40, (len(which),), generator=generator).tolist()
        counts = [min(c, LENS[i] - pages.done[i]) for i, c in zip(which, sizes, strict=True)]
        for i, n, part in zip(which, counts, pages.step(which, counts), strict=True):
            end = pages.done[i]
            assert_same_bits(part, truth[i][end - n : end], f"length {LENS[i]} at {end}")


def test_neighbours_of_nan_change_nothing():
    """A broken neighbour stays its own trouble."""
    qkv = make_qkv((4, 2, 16), LENS)
    truth = packed(qkv, LENS).split(LENS)
    for broken in (2, 7):
        damaged = [x.clone() for x in qkv]
        for x in damaged:
            x.split(LENS)[broken].fill_(NAN)
        found = packed(damaged, LENS).split(LENS)
        pages = Pages(damaged, LENS, 48).run(17).split(LENS)
        for i in range(len(LENS)):
            if i != broken:
                assert_same_bits(found[i], truth[i])
                assert_same_bits(pages[i], truth[i])


@pytest.mark.parametrize("stale", [NAN, float("inf"), 1e30, 0.0])
def test_stale_memory_changes_nothing(stale):
    """Unused pages, and the last page behind the sequence's end, may hold anything."""
    qkv = make_qkv((6, 2, 16), LENS)
    truth = packed(qkv, LENS)
    for page_size in PAGE_SIZES:
        pages = Pages(qkv, LENS, page_size)
        for cache in pages.caches:
            cache.fill_(stale)
        assert_same_bits(pages.run(64), truth, f"page size {page_size}")


def test_unused_table_entries_change_nothing():
    """A wider page table (a longer neighbour) and what stands in its unused places."""
    qkv = make_qkv((4, 2, 16), (70, 20))
    truth = packed(qkv, (70, 20))
    for filler in (0, 1, 8):
        pages = Pages(qkv, (70, 20), 16)
        used = pages.table.clone()
        pages.table = torch.full((2, 40), filler)
        pages.table[0, :5] = used[0, :5]
        pages.table[1, :2] = used[1, :2]
        assert_same_bits(pages.run(13), truth, f"filler {filler}")


def test_shared_pages_serve_two_sequences():
    """A prefix hit reads another sequence's pages: same keys, same bits."""
    qkv = make_qkv((4, 2, 16), (80, 80))
    for x in qkv:
        first, second = x.split(80)
        second[:64] = first[:64]
    truth = packed(qkv, (80, 80)).split(80)
    pages = Pages(qkv, (80, 80), 16)
    pages.step([0], [80])
    pages.table[1, :4] = pages.table[0, :4]
    pages.done[1] = 64
    [found] = pages.step([1], [16])
    assert_same_bits(found, truth[1][64:])


def test_runs_repeat_themselves():
    qkv = make_qkv((9, 3, 33), LENS)
    assert_same_bits(packed(qkv, LENS), packed(qkv, LENS))


def test_strided_queries_are_the_same():
    """q, k and v come as slices of one projection."""
    q, k, v = make_qkv((4, 2, 16), LENS)
    truth = packed((q, k, v), LENS)
    joined = torch.cat([q, k, v], dim=1)
    assert_same_bits(packed(joined.split([4, 2, 2], dim=1), LENS), truth)
