"""What every attention kind has to do: one contract test over all of them, and one from outside."""

import importlib.metadata
import importlib.util

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, run_python

from samebit.kernels.attention import CanonicalAttention, attention_ref
from samebit.kernels.attention_kind import AttentionKind, GraphEntries, Heads
from samebit.kernels.flashinfer import VERSION, _pages
from samebit.kernels.kv_write import kv_write
from samebit.kernels.profile import numerics_profile
from samebit.kernels.registry import ATTENTION_KINDS, attention_kind

LENS = (1, 17, 64, 65, 130, 1100)
PAGE = 16
gpu = pytest.mark.gpu
no_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
no_library = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="flashinfer-python is not installed"
)
ON_GPU = [
    pytest.param(name, marks=[gpu, no_card, *([no_library] if name == "flashinfer" else [])])
    for name in ATTENTION_KINDS
]
PLACES = [(name, "cpu") for name in ("canonical", "plain")]
PLACES += [pytest.param((*param.values, "cuda"), marks=param.marks) for param in ON_GPU]


class Case:
    """A kind, packed queries, keys and values, and a cache that holds the same, else NaN."""

    def __init__(self, kind: type[AttentionKind], device: str) -> None:
        self.heads = Heads(9, 3, 64, scale=0.1)
        self.attention = kind(self.heads, torch.device(device))
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (
            torch.randn(sum(LENS), n, 64, generator=generator).to(device, self.dtype)
            for n in (9, 3, 3)
        )
        counts = [-(-n // PAGE) for n in LENS]
        pages = torch.randperm(sum(counts) + 3, generator=generator)[: sum(counts)].split(counts)
        self.table = torch.zeros(len(LENS), max(counts), dtype=torch.int64)
        shape = (2, sum(counts) + 3, PAGE, 3, 64)
        self.caches = torch.full(shape, float("nan"), dtype=self.dtype, device=device)
        parts = zip(pages, self.split(self.k), self.split(self.v), strict=True)
        for i, (own, k, v) in enumerate(parts):
            self.table[i, : len(own)] = own
            place = torch.arange(len(k))
            kv_slots = own[place // PAGE] * PAGE + place % PAGE
            kv_write(k, v, *self.caches, kv_slots.to(device))

    @staticmethod
    def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.split(list(LENS))

    def last(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The last rows of every sample."""
        return torch.cat([part[-n:] for part, n in zip(self.split(x), counts, strict=True)])

    def hold(self, found: torch.Tensor, truth: torch.Tensor, case: object = "") -> None:
        """To the bit where the kind promises it, else closely."""
        if self.attention.is_invariant:
            assert_same_bits(found, truth, case)
        else:
            torch.testing.assert_close(found, truth, rtol=2e-2, atol=2e-3)


@pytest.fixture(params=PLACES, ids=str)
def case(request, monkeypatch):
    monkeypatch.setitem(ATTENTION_KINDS, "plain", "plain_attention:PlainAttention")
    name, device = request.param
    return Case(attention_kind(name), device)


def test_packed_attention_is_attention(case):
    """Its values are the reference's, at the dtype's error."""
    attention = case.attention
    found = attention.attend_packed(case.q, case.k, case.v, attention.plan_packed(LENS))
    wide = [x.float() for x in (case.q, case.k, case.v)]
    truth = attention_ref(*wide, LENS, case.heads.scale)
    bound = 1e-5 if case.dtype == torch.float32 else 2e-2
    assert (found.float() - truth).norm() <= bound * truth.norm()


@pytest.mark.parametrize("counts", [[1] * 6, [1, 16, 3, 64, 65, 700], list(LENS)], ids=str)
def test_steps_over_pages_are_the_packed_forward(case, counts):
    """Decode, chunks, both in one step, and whole prompts."""
    attention = case.attention
    packed = attention.attend_packed(case.q, case.k, case.v, attention.plan_packed(LENS))
    plan = attention.plan_step(counts, LENS, case.table, PAGE)
    found = attention.attend(case.last(case.q, counts), *case.caches, plan)
    case.hold(found, case.last(packed, counts))


def test_parts_of_samples_are_the_packed_forward(case):
    """Two parts of one sample, and one of another, as a context parallel rank has them."""
    attention, start = case.attention, sum(LENS[:5])
    packed = attention.attend_packed(case.q, case.k, case.v, attention.plan_packed(LENS))
    plan = attention.plan_context((30, 100, 17), (30, 300, 17), (start, start, 1), sum(LENS))
    rows = [*range(start, start + 30), *range(start + 200, start + 300), *range(1, 18)]
    found = attention.attend_packed(case.q[rows], case.k, case.v, plan)
    case.hold(found, packed[rows])


def test_plans_stay_valid_as_long_as_they_live(case):
    """Five of them, made before the first is used."""
    attention = case.attention
    packed = attention.attend_packed(case.q, case.k, case.v, attention.plan_packed(LENS))
    ones = case.last(case.q, [1] * 6)
    plans = []
    for i in range(5):
        order = [*range(i, 6), *range(i)]
        lens = [LENS[j] for j in order]
        plans.append((order, attention.plan_step([1] * 6, lens, case.table[order], PAGE)))
    for order, plan in plans:
        found = attention.attend(ones[order].contiguous(), *case.caches, plan)
        case.hold(found, case.last(packed, [1] * 6)[order])


def test_gradients_are_those_of_the_reference(case):
    """And the same bits twice."""
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    grad = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(1)).to(case.q)
    attention = case.attention
    plan = attention.plan_packed(LENS)
    found, again = (
        torch.autograd.grad(attention.attend_packed(*inputs, plan), inputs, grad) for _ in range(2)
    )
    wide = [x.detach().float().requires_grad_() for x in inputs]
    output = attention_ref(*wide, LENS, case.heads.scale)
    truth = torch.autograd.grad(output, wide, grad.float())
    bound = 1e-5 if case.dtype == torch.float32 else 2e-2
    for a, b, t in zip(found, again, truth, strict=True):
        assert_same_bits(a, b)
        assert (a.float() - t).norm() <= bound * t.norm()


@pytest.mark.parametrize("name", ON_GPU)
def test_replays_are_the_steps_without_a_graph(name):
    """One capture for all contexts up to a bound and fewer samples than its batch."""
    case, batch = Case(attention_kind(name), "cuda"), 8
    attention, device = case.attention, case.q.device
    table = torch.zeros(10, case.table.shape[1], dtype=torch.int32, device=device)
    table[2:8] = case.table.to(table)
    entries = GraphEntries.empty(batch, table, PAGE, max_context=2048)
    plan, rows, lens = (
        attention.plan_graph(entries),
        entries.table_rows,
        entries.context_lens,
    )
    q = torch.zeros(batch, 9, 64, dtype=case.dtype, device=device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())  # whoever fills the operands
    with torch.cuda.stream(stream):
        attention.attend(q, *case.caches, plan)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        output = attention.attend(q, *case.caches, plan)
    for which in ([5], [0, 1, 2, 3, 4, 5], [4, 2]):
        contexts = [LENS[i] for i in which]
        step = attention.plan_step([1] * len(which), contexts, case.table[which], PAGE)
        last = case.last(case.q, [1] * 6)[which]
        truth = attention.attend(last, *case.caches, step)
        size = len(which)
        q[:size] = last
        rows.zero_(), lens.zero_()
        rows[:size] = torch.tensor(which, device=device) + 2
        lens[:size] = torch.tensor(contexts, device=device)
        host = rows[:size].cpu().numpy().astype("int64"), table.cpu().numpy()
        attention.prepare_replay(plan, lens[:size].cpu().numpy().astype("int64"), *host, None)
        graph.replay()
        case.hold(output[:size], truth, which)


def test_the_profile_names_the_kind():
    """With what it depends on; the canonical one's tiles are its own."""
    from plain_attention import PlainAttention

    cpu = torch.device("cpu")
    plain = numerics_profile(cpu, attention=PlainAttention)
    assert (plain.attention, plain.kv_tile, plain.kv_split) == ("plain 1.0", None, None)
    canonical = numerics_profile(cpu)
    assert canonical == numerics_profile(cpu, attention=CanonicalAttention)
    assert (canonical.attention, canonical.kv_tile, canonical.kv_split) == ("canonical", 64, None)
    assert CanonicalAttention.tiles("cuda") == (128, 1024)
    assert plain.digest != canonical.digest


def test_names_are_known_without_torch():
    """Recipes check them before anything heavy is imported."""
    script = "import sys, samebit.kernels.registry as r; print(*r.ATTENTION_KINDS, *sys.modules)"
    names, modules = list(ATTENTION_KINDS), run_python(script).split()
    assert modules[: len(names)] == names
    assert not {"torch", "numpy"} & set(modules)


def test_flashinfer_is_for_gpus_and_of_one_version(monkeypatch):
    """Refused by name where it does not run, before anything is made."""
    kind = attention_kind("flashinfer")
    with pytest.raises(ValueError, match="numerics.attention is 'flashinfer'.* device is 'cpu'"):
        kind(Heads(4, 2, 64, 0.1), torch.device("cpu"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    with pytest.raises(ValueError, match=r"needs flashinfer-python 0\.7.*it is 0\.1: pip install"):
        kind.require_usable("cuda")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: VERSION)
    with pytest.raises(ValueError, match=r"heads of \(64, 128, 256\) features; head_dim is 16"):
        kind(Heads(4, 2, 16, 0.1), torch.device("cuda"))
    assert not kind.is_invariant
    assert kind.tiles("cuda") == (None, None)


def test_pages_of_flashinfer():
    """Page ids of contexts one behind another, and how many keys the last page of each holds."""
    table = np.arange(12).reshape(3, 4)
    indptr, indices, last = _pages(np.array([33, 16, 1]), table, 16)
    assert indptr.tolist() == [0, 3, 4, 5]
    assert indices.tolist() == [0, 1, 2, 4, 8]
    assert last.tolist() == [1, 16, 1]
