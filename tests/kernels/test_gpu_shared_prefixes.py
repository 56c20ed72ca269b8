"""Prefixes that decode entries share, on the card: read once or by each, the same bits."""

import random

import numpy as np
import pytest
import torch

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import GraphEntries, Heads
from samebit.kernels.gpu import decode_attention, hopper_decode

pytestmark = pytest.mark.gpu

HEADS = ((32, 8, 128), (16, 8, 128), (9, 3, 64), (8, 8, 64), (28, 4, 128), (64, 4, 128))
EDGES = [n + d for n in (128, 256, 640, 1024, 1152, 2048) for d in (-1, 0, 1, 40)]


class Contexts:
    """Random groups of contexts over one cache: alone, siblings, and prefixes within prefixes."""

    def __init__(self, heads, page_size, seed, count=40):
        rng = random.Random(seed)
        self.page_size, rows, self.lens = page_size, [], []
        pages = 0
        while len(rows) < count:
            begun = rng.randrange(len(rows)) if rows and rng.random() < 0.6 else None
            shared = rng.choice(EDGES)
            if begun is not None:
                shared = min(shared, self.lens[begun])
            for _ in range(rng.choice((1, 2, 3, 5, 8, 16, 17, 64))):
                length = shared + rng.choice((1, 2, 16, 100, 128, 300, 1100))
                full = 0 if begun is None else shared // page_size
                own = -(-length // page_size) - full
                first = rows[begun][:full] if full else []
                rows.append([*first, *range(pages, pages + own)])
                self.lens.append(length)
                pages += own
                begun = len(rows) - 1 if begun is None else begun
        order = list(range(len(rows)))
        rng.shuffle(order)
        rows, self.lens = [rows[i] for i in order], [self.lens[i] for i in order]
        self.table = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        places = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
        for target, row in zip(self.table, rows, strict=True):
            target[: len(row)] = places[row]
        shape = (2, pages, page_size, heads.num_kv_heads, heads.head_dim)
        self.caches = torch.randn(shape, device="cuda").bfloat16()


def kinds(heads):
    together, alone = (CanonicalAttention(heads, torch.device("cuda")) for _ in range(2))
    together.least_shared_bytes, alone.least_shared_bytes = 1, None
    return together, alone


def take_all(monkeypatch):
    """The Hopper kernel for entries' own keys takes any number of them."""
    monkeypatch.setattr(hopper_decode, "_MOST_SPLITS", 9)
    monkeypatch.setattr(hopper_decode, "_LEAST_ITEMS", 0)


def counted(monkeypatch, name):
    """A list that grows by each call of a kernel."""
    calls, run = [], getattr(decode_attention, name)
    monkeypatch.setattr(decode_attention, name, lambda *args: (calls.append(1), run(*args))[1])
    return calls


@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("page_size", [16, 48, 64])
@pytest.mark.parametrize("most", [1, 2, 5, 16])
@pytest.mark.parametrize("on_hopper", [False, True])
def test_together_and_alone(shape, page_size, most, on_hopper, monkeypatch):
    """Any mixture of groups, with one query and with up to 16; and each query by itself."""
    fits = page_size != 48 and shape[2] in (64, 128)
    if on_hopper and not (fits and torch.cuda.get_device_capability()[0] == 9):
        pytest.skip("the kernel for Hopper takes whole pages of heads of 64 or 128, on a Hopper")
    if not on_hopper:
        monkeypatch.setattr(decode_attention, "takes", lambda *_: False)
        monkeypatch.setattr(decode_attention, "fits", lambda *_: False)
    take_all(monkeypatch)
    calls = counted(monkeypatch, "prefix_attention")
    own_calls = counted(monkeypatch, "own_attention")
    heads = Heads(*shape, scale=shape[2] ** -0.5)
    together, alone = kinds(heads)
    for seed in range(3):
        contexts = Contexts(heads, page_size, seed)
        rng, lens = random.Random(seed), contexts.lens
        queries = [rng.randint(1, min(most, n)) for n in lens]
        q = torch.randn(sum(queries), *shape[::2], device="cuda").bfloat16()
        step = queries, lens, contexts.table, page_size
        plan = together.plan_step(*step)
        shares = any(entries.prefixes is not None for entries in plan.decode)
        assert shares or shape[0] // shape[1] * most > 64
        found = together.attend(q, *contexts.caches, plan)
        plan = alone.plan_step(*step)
        truth = alone.attend(q, *contexts.caches, plan)
        assert torch.equal(found, truth), (shape, page_size, most, seed)
        with monkeypatch.context() as patch:
            patch.setattr(decode_attention, "fits", lambda *_: False)
            assert torch.equal(truth, alone.attend(q, *contexts.caches, plan))
        small = [e for e in plan.decode if shape[0] // shape[1] * e.max_queries <= 16]
        assert bool(calls) == (on_hopper and shares)
        assert bool(own_calls) == (on_hopper and bool(small))
        calls.clear(), own_calls.clear()
        if most > 1:
            owner = np.repeat(np.arange(len(lens)), queries)
            ends = np.cumsum(queries)
            places = [lens[i] - (ends[i] - row) + 1 for row, i in enumerate(owner)]
            single = alone.plan_step([1] * len(q), places, contexts.table[owner], page_size)
            assert torch.equal(found, alone.attend(q, *contexts.caches, single))


@pytest.mark.parametrize(("tight", "own"), [(False, False), (True, False), (True, True)])
def test_groups_of_a_replay_are_those_of_its_step(tight, own, monkeypatch):
    """One capture; samples, groups and their prefixes change from replay to replay. own: the kernel
    for Hopper, of which some entries only fill the batch up."""
    if own and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for Hopper")
    if own:
        take_all(monkeypatch)
    heads = Heads(16, 8, 128, scale=0.1)
    together, alone = kinds(heads)
    contexts = Contexts(heads, 64, 0, count=100)
    batch, device = 64, torch.device("cuda")
    table = contexts.table.int().to(device)
    entries = GraphEntries.empty(batch, table, 64, max_context=4096)
    rng, host = random.Random(0), contexts.table.int().numpy()
    steps = []
    for size in (64, 2, 33, 64, 17):
        rows = np.array(rng.sample(range(len(host)), size))
        lens = np.array([contexts.lens[i] for i in rows])
        if (shared := together.shared_prefixes(lens, host[rows], 64)) is not None:
            steps.append((size, rows, lens, shared))
    assert len(steps) >= 3
    max_own = max(shared.longest_own(lens) for _, _, lens, shared in steps)
    plan = together.plan_graph(entries, max_own if tight else 4096)
    q = torch.zeros(batch, 16, 128, dtype=torch.bfloat16, device=device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())  # whoever fills the operands
    with torch.cuda.stream(stream):
        together.attend(q, *contexts.caches, plan)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        output = together.attend(q, *contexts.caches, plan)
    for size, rows, lens, shared in steps:
        q[:size] = torch.randn(size, 16, 128, device=device).bfloat16()
        entries.table_rows.zero_(), entries.context_lens.zero_()
        entries.table_rows[:size] = torch.from_numpy(rows).to(device)
        entries.context_lens[:size] = torch.from_numpy(lens).to(device)
        together.prepare_replay(plan, lens, rows, host, shared)
        graph.replay()
        step = alone.plan_step([1] * size, lens.tolist(), contexts.table[rows], 64)
        with monkeypatch.context() as patch:
            patch.setattr(decode_attention, "fits", lambda *_: False)
            assert torch.equal(output[:size], alone.attend(q[:size], *contexts.caches, step))
