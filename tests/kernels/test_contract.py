"""Every operation against fp64, and what the contract adds: a row's bits are the row's own."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from helpers import assert_same_bits, attention_of, run_python

from samebit.kernels.kv_write import kv_write, kv_write_ref
from samebit.kernels.linear import linear
from samebit.kernels.logprob import logprob, logsumexp
from samebit.kernels.reduce import reduce_ref
from samebit.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_ref
from samebit.kernels.rope import rope, rope_ref, rope_table
from samebit.kernels.sample import gumbel_noise, sample
from samebit.kernels.swiglu import swiglu, swiglu_ref

NUM_ROWS = 140
ROW_COUNTS = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129)
EPS = 1e-6


@dataclass
class Case:
    """A row-wise operation. `run`, `ref` and `exact` take `rows` (leading dimension T) and `fixed`;
    `ref` is plain torch in fp32, `exact` plain torch in fp64. All return a tuple of tensors."""

    run: Callable
    ref: Callable
    exact: Callable
    rows: tuple[torch.Tensor, ...]
    fixed: tuple[torch.Tensor, ...]


def randn(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator) * scale


def linear_case(num_out, width):
    return Case(
        run=lambda x, w: (linear(x, w),),
        ref=lambda x, w: (x @ w.t(),),
        exact=lambda x, w: (x @ w.t(),),
        rows=(randn(NUM_ROWS, width),),
        fixed=(randn(num_out, width, seed=1),),
    )


def norm_64(x, w):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w


def rms_norm_case(width):
    return Case(
        run=lambda x, w: (rms_norm(x, w, EPS),),
        ref=lambda x, w: (rms_norm_ref(x, w, EPS),),
        exact=lambda x, w: (norm_64(x, w),),
        rows=(randn(NUM_ROWS, width, scale=3.0),),
        fixed=(randn(width, seed=1),),
    )


def head_norm_case(num_heads, head_dim):
    case = rms_norm_case(head_dim)
    case.rows = (randn(NUM_ROWS, num_heads, head_dim),)
    return case


def add_rms_norm_case(width):
    return Case(
        run=lambda x, r, w: add_rms_norm(x, r, w, EPS),
        ref=lambda x, r, w: (rms_norm_ref(x + r, w, EPS), x + r),
        exact=lambda x, r, w: (norm_64(x + r, w), x + r),
        rows=(randn(NUM_ROWS, width), randn(NUM_ROWS, width, seed=1)),
        fixed=(randn(width, seed=2),),
    )


def rope_64(x, positions, table):
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rope_case(num_heads, head_dim):
    return Case(
        run=lambda x, p, t: (rope(x, p, t),),
        ref=lambda x, p, t: (rope_ref(x, p, t),),
        exact=lambda x, p, t: (rope_64(x, p, t),),
        rows=(randn(NUM_ROWS, num_heads, head_dim), torch.arange(NUM_ROWS) * 7 % 300),
        fixed=(rope_table(head_dim, 10000.0, 300),),
    )


def silu_64(x):
    gate, up = x.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def swiglu_case(width):
    return Case(
        run=lambda x: (swiglu(x),),
        ref=lambda x: (swiglu_ref(x),),
        exact=lambda x: (silu_64(x),),
        rows=(randn(NUM_ROWS, 2 * width, scale=4.0),),
        fixed=(),
    )


def log_softmax_rows(hidden, temperature, weight):
    return (hidden @ weight.t() / temperature[:, None]).log_softmax(-1)


def logprob_plain(hidden, ids, temperature, weight):
    rows = log_softmax_rows(hidden, temperature, weight)
    return (rows.gather(1, ids[:, None]).squeeze(1),)


def logprob_case(vocab_size, width):
    generator = torch.Generator().manual_seed(3)
    padding = torch.full((5, width), 7.0)  # rows past vocab_size must not count
    return Case(
        run=lambda h, i, t, w: logprob(h, torch.cat([w, padding.to(w)]), i, t, vocab_size),
        ref=logprob_plain,
        exact=logprob_plain,
        rows=(
            randn(NUM_ROWS, width),
            torch.randint(vocab_size, (NUM_ROWS,), generator=generator),
            torch.rand(NUM_ROWS, generator=generator) + 0.5,
        ),
        fixed=(randn(vocab_size, width, scale=0.3),),
    )


def logsumexp_case(vocab_size):
    return Case(
        run=lambda x: (logsumexp(x),),
        ref=lambda x: (x.logsumexp(-1),),
        exact=lambda x: (x.logsumexp(-1),),
        rows=(randn(NUM_ROWS, vocab_size, scale=5.0),),
        fixed=(),
    )


LINEAR_SHAPES = ((1, 33), (33, 100), (100, 33), (64, 48), (331, 48), (48, 512))
CASES = {
    **{f"linear-{n}x{k}": (linear_case, n, k) for n, k in LINEAR_SHAPES},
    **{f"rms_norm-{d}": (rms_norm_case, d) for d in (1, 16, 33, 48, 100, 257)},
    **{f"head_norm-{n}x{h}": (head_norm_case, n, h) for n, h in ((3, 16), (5, 33))},
    **{f"add_rms_norm-{d}": (add_rms_norm_case, d) for d in (33, 100)},
    **{f"rope-{n}x{h}": (rope_case, n, h) for n, h in ((1, 2), (3, 16), (5, 34), (2, 100))},
    **{f"swiglu-{f}": (swiglu_case, f) for f in (1, 33, 50, 104)},
    **{f"logprob-{v}x{d}": (logprob_case, v, d) for v, d in ((12, 33), (331, 48), (1025, 20))},
    **{f"logsumexp-{v}": (logsumexp_case, v) for v in (1, 33, 127, 128, 129, 1024, 3001)},
}


@pytest.fixture(params=CASES)
def case(request):
    make, *sizes = CASES[request.param]
    return make(*sizes)


def same(found, expected, what=""):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b, what)


def wide(tensors, dtype=torch.float64):
    return [x.to(dtype) if x.is_floating_point() else x for x in tensors]


def test_values_are_as_good_as_plain_torch(case):
    """At most twice the error of plain torch fp32, measured against fp64."""
    found = case.run(*case.rows, *case.fixed)
    plain = case.ref(*case.rows, *case.fixed)
    exact = case.exact(*wide(case.rows), *wide(case.fixed))
    # zip leaves out the entropies: a statistic, held to a tolerance below.
    for y, p, e in zip(found, plain, exact, strict=False):
        assert y.dtype == torch.float32
        ulp = e.abs().max() * 2.0**-24
        assert (y - e).abs().max() <= 2 * (p - e).abs().max() + ulp


def test_first_and_last_rows_alone_are_the_same(case):
    """A batch of any size gives each of its rows the bits of the large batch."""
    full = case.run(*case.rows, *case.fixed)
    for m in ROW_COUNTS:
        for part in (slice(0, m), slice(NUM_ROWS - m, NUM_ROWS)):
            found = case.run(*(x[part] for x in case.rows), *case.fixed)
            same(found, [y[part] for y in full], f"{m} rows, {part}")


def test_every_row_alone_is_the_same(case):
    """Decode of one sequence gives what the batch gives, at each place."""
    full = case.run(*case.rows, *case.fixed)
    for i in range(0, NUM_ROWS, 3):
        found = case.run(*(x[i : i + 1] for x in case.rows), *case.fixed)
        same(found, [y[i : i + 1] for y in full], f"row {i}")


def test_order_of_rows_does_not_matter(case):
    """The place in the batch moves no bit."""
    full = case.run(*case.rows, *case.fixed)
    for seed in range(3):
        order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(seed))
        found = case.run(*(x[order] for x in case.rows), *case.fixed)
        same(found, [y[order] for y in full], f"order {seed}")


def test_repeated_runs_are_the_same(case):
    """No state, no race."""
    runs = [case.run(*case.rows, *case.fixed) for _ in range(3)]
    same(runs[1], runs[0])
    same(runs[2], runs[0])


def shifted(x, offset):
    """The same values `offset` elements into a buffer, so the address has another alignment."""
    buffer = torch.zeros(x.numel() + offset, dtype=x.dtype)
    view = buffer[offset:].view(x.shape)
    return view.copy_(x)


def strided(x, before, after):
    """The same values as a slice of wider rows."""
    buffer = torch.full((*x.shape[:-1], before + x.shape[-1] + after), 7, dtype=x.dtype)
    view = buffer[..., before : before + x.shape[-1]]
    return view.copy_(x)


def test_memory_layout_does_not_matter(case):
    """Addresses and strides move no bit."""
    full = case.run(*case.rows, *case.fixed)
    for offset in (1, 3, 5, 8):
        moved = [shifted(x, offset) for x in (*case.rows, *case.fixed)]
        same(case.run(*moved), full, f"offset {offset}")
    for before, after in ((1, 0), (0, 3), (5, 2)):
        moved = [strided(x, before, after) for x in (*case.rows, *case.fixed)]
        same(case.run(*moved), full, f"strides {before}, {after}")
    for m in (1, 5, 17):
        moved = [strided(x[:m], 1, 2) for x in case.rows]
        same(case.run(*moved, *case.fixed), [y[:m] for y in full], f"{m} strided rows")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_refused(case, dtype):
    """The CPU contract is fp32; silent conversion would give other bits."""
    with pytest.raises(ValueError, match=f"float32, got {dtype}"):
        case.run(*wide(case.rows, dtype), *wide(case.fixed, dtype))


def test_other_devices_are_refused(case):
    """No silent fall-back to plain torch."""
    with pytest.raises(NotImplementedError, match="no implementation for device 'meta'"):
        case.run(*(x.to("meta") for x in (*case.rows, *case.fixed)))


def test_zero_rows():
    """A rank without tokens is no error."""
    assert linear(torch.empty(0, 8), torch.ones(5, 8)).shape == (0, 5)


def test_leading_dimensions_are_rows():
    x, w = randn(3, 7, 33), randn(20, 33)
    assert_same_bits(linear(x, w), linear(x.view(21, 33), w).view(3, 7, 20))


@pytest.mark.parametrize("vocab_size", [12, 331, 1025])
def test_entropies_are_right(vocab_size):
    """A logged statistic, not part of the promise to be exact: within 1e-5 nats of fp64."""
    case = logprob_case(vocab_size, 33)
    hidden, _, temperature = wide(case.rows)
    rows = log_softmax_rows(hidden, temperature, *wide(case.fixed))
    _, found = case.run(*case.rows, *case.fixed)
    torch.testing.assert_close(found.double(), -(rows.exp() * rows).sum(-1), rtol=0, atol=1e-5)


def test_entropy_is_not_differentiable():
    hidden = randn(4, 8).requires_grad_()
    values, entropy = logprob(hidden, randn(20, 8), torch.arange(4), torch.ones(4), 20)
    assert values.requires_grad
    assert not entropy.requires_grad


def test_logsumexp_segments_do_not_depend_on_a_shard():
    """The 8 segments of the padded vocabulary: a larger vocabulary of -inf changes nothing."""
    logits = randn(9, 1000, scale=5.0)
    padded = torch.cat([logits, torch.full((9, 24), float("-inf"))], -1)
    assert_same_bits(logsumexp(padded), logsumexp(logits))


def test_logsumexp_of_extreme_logits():
    """Large logits neither overflow nor vanish."""
    logits = torch.tensor([[1e30, 0.0, -1e30], [-1e30, -1e30, -1e30], [88.0, 88.0, -200.0]])
    expected = torch.tensor([1e30, -1e30, 88.0 + 0.6931472])
    torch.testing.assert_close(logsumexp(logits), expected)


# -- operations that are not row-wise ------------------------------------------------------------


def kv_case(dtype=torch.float32):
    key, value = (randn(5, 2, 4, seed=s).to(dtype) for s in (1, 2))
    caches = [torch.full((3, 4, 2, 4), float("nan"), dtype=dtype) for _ in range(2)]
    return key, value, *caches, torch.tensor([11, 0, 5, 4, 7])


def test_kv_write_writes_its_slots_and_no_others():
    key, value, keys, values, kv_slots = kv_case()
    kv_write(key, value, keys, values, kv_slots)
    for new, cache in ((key, keys), (value, values)):
        flat = cache.view(12, 2, 4)
        assert_same_bits(flat[kv_slots], new)
        others = [i for i in range(12) if i not in kv_slots.tolist()]
        assert flat[others].isnan().all()
    again = kv_case()
    kv_write_ref(*again)
    assert_same_bits(again[2], keys)


def test_kv_write_takes_strided_inputs():
    key, value, keys, values, kv_slots = kv_case()
    kv_write(strided(key, 1, 2), strided(value, 0, 3), keys, values, kv_slots)
    assert_same_bits(keys.view(12, 2, 4)[kv_slots], key)
    assert_same_bits(values.view(12, 2, 4)[kv_slots], value)


def refused_calls(dtype, device):
    """Calls of the operations that CASES does not hold, each with one kind of tensor throughout."""

    def make(*shape):
        return torch.ones(*shape, device=device, dtype=dtype)

    attention = attention_of(torch.ones(3, 4, 8), torch.ones(3, 2, 8))
    plan = attention.plan_packed([3])
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    caches = make(2, 4, 2, 4), make(2, 4, 2, 4)
    return {
        "attention": lambda: attention.attend_packed(
            make(3, 4, 8), make(3, 2, 8), make(3, 2, 8), plan
        ),
        "kv_write": lambda: kv_write(make(2, 2, 4), make(2, 2, 4), *caches, ids),
        "sample": lambda: sample(make(2, 9), make(2, 9)),
        "gumbel_noise": lambda: gumbel_noise(ids, ids, ids, 9),
    }


@pytest.mark.parametrize("name", ["attention", "kv_write", "sample"])
def test_other_dtypes_are_refused_by(name):
    with pytest.raises(ValueError, match="float32, got torch.bfloat16"):
        refused_calls(torch.bfloat16, "cpu")[name]()


@pytest.mark.parametrize("name", ["attention", "kv_write", "sample", "gumbel_noise"])
def test_other_devices_are_refused_by(name):
    with pytest.raises(NotImplementedError, match=f"{name} has no implementation.*'meta'"):
        refused_calls(torch.float32, "meta")[name]()


def test_reduce_adds_in_rank_order_and_rounds_once():
    """1 is lost beside 1e8 in ascending order, and would not be in another."""
    a, b, c = (torch.tensor([v]) for v in (1e8, 1.0, -1e8))
    assert reduce_ref([a, b, c], torch.float32).item() == 0.0
    assert reduce_ref([a, c, b], torch.float32).item() == 1.0
    # 1 + 2^-8 + 2^-9 is one bf16 rounding from 1.0078125; rounding each sum would give 1.
    parts = [torch.tensor([v]) for v in (1.0, 2.0**-8, 2.0**-9)]
    assert reduce_ref(parts, torch.bfloat16).item() == 1.0078125


_REDUCE = """
import sys, torch, torch.distributed as dist
from samebit.kernels.reduce import RankGroup, sum_over_ranks
rank, size, store = int(sys.argv[1]), 3, sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
values = [torch.randn(50, 33, generator=torch.Generator().manual_seed(r)) for r in range(size)]
found = sum_over_ranks(values[rank].t(), RankGroup(rank, size, dist.group.WORLD), torch.float32)
expected = ((values[0] + values[1]) + values[2]).t()
assert torch.equal(found, expected), (found - expected).abs().max()
dist.barrier()
dist.destroy_process_group()
"""


def test_every_rank_gets_the_sum_in_rank_order(tmp_path):
    """A collective's own order may differ from the written-out one."""
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(run_python, _REDUCE, r, tmp_path / "store") for r in range(3)]
        for run in runs:
            run.result()
