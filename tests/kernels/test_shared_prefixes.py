"""Which decode entries are to read a prefix together: planned on the host, for any page tables."""

import random

import numpy as np
import pytest
import torch
from helpers import run_python

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import Heads
from samebit.kernels.shared_prefixes import best_groups, find_shared_prefixes

TILE, SPLIT = 128, 512


def partitions(items):
    """Every way to cut a list of items into sets."""
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


def spared(shared, members, capacity):
    """Tiles that a group's members need not read, if it is a group of those that share them."""
    if len(members) < 2:
        return 0
    tiles = min(shared[min(members) : max(members)])
    return tiles * (len(members) - -(-len(members) // capacity))


def test_groups_spare_the_most_tiles():
    """As all partitions of few entries show, where a task holds any group; else they are groups."""
    rng = random.Random(0)
    for _ in range(150):
        size, capacity = rng.randint(2, 6), rng.choice([2, 3, 8, 8])
        shared = [rng.randint(0, 3) for _ in range(size - 1)]
        groups = best_groups(shared, capacity)
        places = [place for group in groups for place in group.places]
        assert len(set(places)) == len(places)
        for tiles, members in groups:
            assert 0 < tiles <= min(shared[min(members) : max(members)])
        total = sum(group.spared(capacity) for group in groups)
        most = max(
            sum(spared(shared, part, capacity) for part in parts)
            for parts in partitions(list(range(size)))
        )
        assert total == most if capacity >= size else total <= most, (shared, capacity)


def test_many_nested_prefixes():
    """A conversation of which each turn has begun to be answered once: more than Python's stack."""
    groups = best_groups(list(range(1, 1500)), 2000)
    assert sum(group.spared(2000) for group in groups) >= 750 * 749


class Tree:
    """Page tables of contexts that begin alike, and otherwise hold what earlier ones left there."""

    def __init__(self, page_size, seed):
        self.rng, self.page_size, self.num_pages = random.Random(seed), page_size, 1
        self.rows, self.lens = [], []

    def pages(self, num_tokens):
        first, self.num_pages = self.num_pages, self.num_pages + -(-num_tokens // self.page_size)
        return list(range(first, self.num_pages))

    def add(self, shared_with, shared_len, length):
        """A context whose first full pages below shared_len are another's."""
        full = 0 if shared_with is None else shared_len // self.page_size
        row = [] if shared_with is None else self.rows[shared_with][:full]
        self.rows.append(row + self.pages(length - full * self.page_size))
        self.lens.append(length)
        return len(self.rows) - 1

    def table(self):
        table = np.zeros((len(self.rows), max(map(len, self.rows)) + 2), dtype=np.int32)
        for row, pages in zip(table, self.rows, strict=True):
            stale = self.rng.choice(self.rows)
            row[: len(stale)] = stale
            row[: len(pages)] = pages
        return table


@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
def test_members_share_what_they_are_said_to(page_size):
    """In random trees, with prefixes that end at tile and page edges and one off."""
    ends = [n + d for n in (TILE, 3 * TILE, 8 * TILE, 9 * page_size) for d in (-1, 0, 1)]
    for seed in range(20):
        tree = Tree(page_size, seed)
        rng = tree.rng
        for i in range(rng.randint(2, 30)):
            other = None if i == 0 or rng.random() < 0.2 else rng.randrange(i)
            shared = 0 if other is None else min(rng.choice(ends), tree.lens[other])
            tree.add(other, shared, shared + rng.randint(1, 400))
        queries = np.array([rng.randint(1, min(5, n)) for n in tree.lens])
        table, capacity = tree.table(), rng.choice([2, 3, 16])
        lens = np.array(tree.lens)
        found = find_shared_prefixes(table, lens - queries, page_size, TILE, SPLIT, capacity)
        if found is None:
            continue
        of_entry = np.zeros(len(table), dtype=int)
        assert sorted(found.lens, reverse=True) == found.lens.tolist()
        for members, length in zip(found.members, found.lens, strict=True):
            entries = members[members >= 0]
            assert (members[len(entries) :] == -1).all()
            assert 2 <= len(entries) <= capacity
            assert length > 0
            assert length % TILE == 0
            pages = -(-length // page_size)
            assert (table[entries, :pages] == table[entries[0], :pages]).all()
            assert (of_entry[entries] == 0).all()
            of_entry[entries] = length
        assert (of_entry == found.of_entry).all()
        assert (of_entry <= lens - queries).all()
        own = [n - have + have % SPLIT for n, have in zip(tree.lens, of_entry, strict=True)]
        assert found.longest_own(lens) == max(own)
        assert found.longest_own(lens + 5) == max(own) + 5
        tiles = (of_entry // TILE).sum() - (found.lens // TILE).sum()
        assert tiles == found.num_spared > 0


def test_siblings_and_a_common_beginning():
    """Groups of a prompt stay together; who has no sibling reads the system prompt with others."""
    tree = Tree(16, 0)
    root = tree.add(None, 0, 300)
    prompts = [tree.add(root, 256, 700) for _ in range(2)]
    siblings = [[p, *(tree.add(p, 640, 650 + 40 * i) for i in range(4))] for p in prompts]
    alone = tree.add(root, 256, 400)
    found = find_shared_prefixes(tree.table(), np.array(tree.lens) - 1, 16, TILE, SPLIT, 16)
    assert [m[m >= 0].tolist() for m in found.members] == [*siblings, [root, alone]]
    assert found.lens.tolist() == [640, 640, 256]
    assert found.num_spared == 5 * 4 * 2 + 2


@pytest.mark.parametrize(
    ("num_groups", "size", "prompt_len", "pays"),
    [
        (64, 8, 512, True),
        (16, 16, 8192, True),
        (8, 8, 512, True),
        (1, 4, 8192, True),
        (1, 9, 512, False),
        (1, 16, 512, False),
        (1, 64, 512, True),
    ],
)
def test_shared_where_that_is_faster(num_groups, size, prompt_len, pays):
    """As measured, with the 8 KV heads of 128 numbers of the larger Qwen3: not for few samples."""
    tree = Tree(64, 0)
    for _ in range(num_groups):
        root = tree.add(None, 0, prompt_len + 256)
        for _ in range(size - 1):
            tree.add(root, prompt_len, prompt_len + 256)
    kind = CanonicalAttention(Heads(32, 8, 128, 0.1), torch.device("cuda"))
    place = np.array(tree.lens), tree.table(), 64
    assert (kind.shared_prefixes(*place) is not None) == pays
    kind.least_shared_bytes = 0
    assert kind.shared_prefixes(*place) is not None
    kind.least_shared_bytes = None
    assert kind.shared_prefixes(*place) is None


def test_nothing_is_shared():
    """One entry, other pages, or less than a tile."""
    tree = Tree(16, 0)
    first = tree.add(None, 0, 500)
    lens = np.array([500])
    assert find_shared_prefixes(tree.table(), lens - 1, 16, TILE, SPLIT, 16) is None
    tree.add(first, 112, 500)
    tree.add(None, 0, 500)
    lens = np.array(tree.lens)
    assert find_shared_prefixes(tree.table(), lens - 1, 16, TILE, SPLIT, 16) is None
    tree.add(first, 128, 500)
    assert (
        find_shared_prefixes(tree.table(), np.array(tree.lens) - 1, 16, TILE, SPLIT, 16) is not None
    )
    short = np.array([127, 499, 499, 499])
    assert find_shared_prefixes(tree.table(), short, 16, TILE, SPLIT, 16) is None


_KERNELS = """
import random
import numpy as np, torch, triton.language as tl
from triton.runtime import interpreter
from samebit.kernels.attention import attention_ref
from samebit.kernels.attention_kind import Heads
from samebit.kernels.gpu import decode_attention as decode
from samebit.kernels.gpu.attention import plan
from samebit.kernels.gpu.prefix_tasks import find_prefixes


def wide(x):
    bf16 = x.dtype.scalar == tl.bfloat16
    return (x.data.astype(np.uint32) << 16).view(np.float32) if bf16 else x.data


def dot(self, a, b, d, *_):
    product = np.einsum("ik,kj->ij", wide(a), wide(b), optimize=False)  # the same for any height
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def bf16(self, value):
    bits = np.array([np.float32(value).view(np.uint32) >> 16], dtype=np.uint16)
    return interpreter.TensorHandle(bits, tl.bfloat16)


# What Triton's interpreter lacks is bf16.
interpreter.InterpreterBuilder.create_dot = dot
interpreter.InterpreterBuilder.get_bf16 = bf16
decode.supported, decode.num_sms = lambda device: False, lambda device: 1
decode.num_stages = lambda *_: 1
decode._WAVES = 1  # one program takes all items
CPU, rng = torch.device("cpu"), random.Random(0)


def attend(q, k, v, made, scale, page_size):
    output = torch.full(q.shape, float("nan"), dtype=q.dtype)
    for entries in made.decode:
        decode.decode_attention(q, k, v, output, entries, made.page_table, page_size, scale)
        assert not entries.counters.any()
    return output


for page_size, heads, shared, lens, queries in (
    (16, Heads(4, 1, 64, 0.1), 128, (129, 300, 140, 130), (1, 1, 1, 2)),
    (48, Heads(3, 1, 64, 0.1), 1025, (1030, 1100), (1, 1)),
    (64, Heads(2, 2, 16, 0.3), 1280, (1290, 1282), (5, 2)),
    (16, Heads(2, 1, 16, 0.3), 1024, (1026, 40, 2049), (3, 3, 3)),
    (64, Heads(1, 1, 16, 0.3), 4096, (5200, 4200), (1, 1)),
    (16, Heads(8, 1, 16, 0.3), 256, [257 + i for i in range(10)], [1] * 10),
):
    table, num_pages = np.zeros((len(lens), -(-max(lens) // page_size)), dtype=np.int64), 1000
    for row, length in zip(table, lens):
        pages = -(-length // page_size)
        full = min(shared, length) // page_size
        row[:full] = np.arange(full)
        row[full:pages] = np.arange(num_pages, num_pages + pages - full)
        num_pages += pages - full
    generator = torch.Generator().manual_seed(0)
    k, v = (
        torch.randn(num_pages * page_size, heads.num_kv_heads, heads.head_dim, generator=generator)
        .bfloat16() for _ in range(2)
    )
    q = torch.randn(sum(queries), heads.num_heads, heads.head_dim, generator=generator).bfloat16()
    step = queries, lens, torch.from_numpy(table), page_size, CPU, None, 0, 16

    def share(query_lens, context_lens, tables):
        return find_prefixes(query_lens, context_lens, tables, page_size, heads, 1)

    alone, together = plan(*step), plan(*step, share=share)
    assert any(entries.prefixes is not None for entries in together.decode)
    found = attend(q, k, v, together, heads.scale, page_size)
    assert torch.equal(found, attend(q, k, v, alone, heads.scale, page_size)), lens
    first = 0
    for row, length, size in zip(table, lens, queries):
        place = np.arange(length)
        rows = row[place // page_size] * page_size + place % page_size
        own = slice(first, first + size)
        padded = torch.cat([q.new_zeros(length - size, *q.shape[1:]), q[own]]).float()
        truth = attention_ref(padded, k[rows].float(), v[rows].float(), [length], heads.scale)
        error = (found[own].float() - truth[-size:]).norm() / truth[-size:].norm()
        assert error < 1e-2, (lens, length, error)
        first += size
"""


def test_shared_tiles_give_the_same_bits():
    """In Triton's interpreter: read once or by each entry, and the values of attention."""
    run_python(_KERNELS, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
