"""Kernels on the card: equal bits by every path, small errors, nothing read that must not be."""

import pytest
import torch
from helpers import attention_of

from samebit.kernels.attention import attention_ref
from samebit.kernels.contract import tree_sum
from samebit.kernels.kv_write import kv_write, kv_write_ref
from samebit.kernels.linear import linear, linear_in_segments
from samebit.kernels.logprob import logprob, logsumexp
from samebit.kernels.rms_norm import rms_norm, rms_norm_ref
from samebit.kernels.rope import rope, rope_ref, rope_table
from samebit.kernels.sample import allowed_tokens, draw, gumbel_noise
from samebit.kernels.swiglu import swiglu, swiglu_ref

pytestmark = pytest.mark.gpu

# (N, K): Qwen3-0.6B, -4B and -8B with their TP 2, 4 and 8 shards, SmolLM2-135M, routers.
SHAPES = (
    (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (3072, 4096), (4096, 2048),
    (12288, 4096), (4096, 6144), (4096, 1024), (4096, 3072), (4096, 512), (4096, 1536),
    (6144, 1024), (1024, 2048), (1024, 3072), (960, 576), (576, 576), (3072, 576), (576, 1536),
    (49152, 576), (19456, 2560), (2560, 9728), (128, 2048), (8, 2048), (64, 64), (151936, 1024),
)  # fmt: skip
ROW_COUNTS = (
    *range(1, 18), 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 191, 255, 256, 257, 384, 511, 512,
    513, 1000, 1024, 2047, 2048,
)  # fmt: skip


def bf16(*shape, seed=0, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, device="cuda", generator=generator) * scale).to(torch.bfloat16)


def error(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_implementations_are_equal(shape):
    """cuBLASLt without split-K and the Triton kernel give the same bits at every row count."""
    from samebit.kernels.gpu import cublaslt
    from samebit.kernels.gpu.linear import linear_triton

    weight, x = bf16(*shape, scale=0.03), bf16(max(ROW_COUNTS), shape[1], seed=1)
    for out_dtype in (torch.bfloat16, torch.float32):
        counts = [m for m in ROW_COUNTS if shape[0] < 100_000 or m <= 513]
        truth = torch.empty(max(counts), shape[0], dtype=out_dtype, device="cuda")
        linear_triton(x[: max(counts)], weight, truth)
        for m in counts:
            for implementation in (cublaslt.matmul, linear_triton):
                y = torch.full_like(truth[:m], float("nan"))
                implementation(x[:m], weight, y)
                assert torch.equal(y, truth[:m]), (shape, m, out_dtype, implementation.__name__)


@pytest.mark.parametrize("shape", [(4096, 4096), (576, 1536), (331, 100), (1000, 72)], ids=str)
def test_linear_value(shape):
    """At most twice the error of torch's own bf16 product; rows do not depend on their company."""
    weight, x = bf16(*shape, scale=0.03), bf16(700, shape[1], seed=1)
    truth = x.double() @ weight.double().t()
    y = linear(x, weight)
    assert error(y, truth) <= 2 * error(x @ weight.t(), truth)
    for m in (1, 5, 64, 257, 300, 699):
        assert torch.equal(linear(x[:m], weight), y[:m])
        assert torch.equal(linear(x[700 - m :], weight), y[700 - m :])


@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 12288), (576, 1536), (72, 128)], ids=str)
@pytest.mark.parametrize("num_segments", [1, 2, 8])
def test_linear_in_segments(shape, num_segments):
    """Parts of a weight's columns, without copies of them, are the products of those copies; their
    sums are one tree, whatever computes its lowest branches."""
    weight, x = bf16(*shape, scale=0.03), bf16(700, shape[1], seed=1)
    parts = zip(x.chunk(num_segments, 1), weight.chunk(num_segments, 1), strict=True)
    truth = tree_sum([linear(a.contiguous(), b.contiguous(), torch.float32) for a, b in parts])
    for m in (1, 17, 64, 256, 300, 700):
        assert torch.equal(linear_in_segments(x[:m], weight, num_segments), truth[:m])


def test_linear_gradients():
    weight, x = bf16(512, 256, scale=0.05).requires_grad_(), bf16(300, 256, seed=1).requires_grad_()
    grad = bf16(300, 512, seed=2)
    found = torch.autograd.grad(linear(x, weight), (x, weight), grad)
    again = torch.autograd.grad(linear(x, weight), (x, weight), grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    truth = (grad.double() @ weight.double(), grad.double().t() @ x.double())
    assert all(error(a, b) < 5e-3 for a, b in zip(found, truth, strict=True))


LENS = (1, 17, 64, 65, 100, 513, 1024, 1300)


@pytest.mark.parametrize(
    ("heads", "kv", "dim"), [(32, 8, 128), (16, 8, 128), (9, 3, 64), (8, 8, 64), (4, 2, 16)]
)
@pytest.mark.parametrize("page_size", [16, 64, 48])
def test_attention_paths_are_equal(heads, kv, dim, page_size):
    """Decode, chunks of every size and the packed forward give the same bits, whatever the rest of
    the memory holds."""
    total, scale = sum(LENS), dim**-0.5
    q, k, v = bf16(total, heads, dim), bf16(total, kv, dim, seed=1), bf16(total, kv, dim, seed=2)
    attention = attention_of(q, k)
    packed = attention.attend_packed(q, k, v, attention.plan_packed(LENS))
    truth = attention_ref(q.float(), k.float(), v.float(), LENS, scale)
    plain = attention_ref(q, k, v, LENS, scale)
    assert error(packed, truth) <= 2 * max(error(plain, truth), 2e-3)
    counts = [-(-n // page_size) for n in LENS]
    ids = torch.randperm(sum(counts) + 7, generator=torch.Generator().manual_seed(3))
    caches = torch.full(
        (2, len(ids), page_size, kv, dim), float("nan"), dtype=torch.bfloat16, device="cuda"
    )
    table = torch.zeros(len(LENS), max(counts), dtype=torch.int64)
    start = used = 0
    for i, length in enumerate(LENS):
        table[i, : counts[i]] = ids[used : used + counts[i]]
        place = torch.arange(length)
        kv_slots = table[i, place // page_size] * page_size + place % page_size
        part = slice(start, start + length)
        kv_write(k[part], v[part], caches[0], caches[1], kv_slots.cuda())
        start, used = start + length, used + counts[i]
    ends = torch.tensor(LENS).cumsum(0).tolist()
    for chunk in (1, 2, 16, 63, 64, 65, 129):
        lens = [min(chunk, n) for n in LENS]
        rows = torch.cat([torch.arange(e - n, e) for e, n in zip(ends, lens, strict=True)]).cuda()
        plan = attention.plan_step(lens, LENS, table, page_size)
        found = attention.attend(q[rows], caches[0], caches[1], plan)
        assert torch.equal(found, packed[rows]), (chunk, page_size)
    mixed = [1 if i % 2 else min(n, 70) for i, n in enumerate(LENS)]
    rows = torch.cat([torch.arange(e - n, e) for e, n in zip(ends, mixed, strict=True)]).cuda()
    plan = attention.plan_step(mixed, LENS, table, page_size)
    assert torch.equal(attention.attend(q[rows], caches[0], caches[1], plan), packed[rows])


@pytest.mark.parametrize(("heads", "kv", "dim"), [(16, 8, 128), (9, 3, 64)])
def test_attention_backward(heads, kv, dim):
    """Deterministic, and at most twice the error of torch's attention in bf16."""
    lens, scale = (1, 65, 300, 513), dim**-0.5
    total = sum(lens)
    q, k, v = (bf16(total, n, dim, seed=s).requires_grad_() for s, n in enumerate((heads, kv, kv)))
    grad = bf16(total, heads, dim, seed=9)
    attention = attention_of(q, k)
    plan = attention.plan_packed(lens)
    found = torch.autograd.grad(attention.attend_packed(q, k, v, plan), (q, k, v), grad)
    again = torch.autograd.grad(attention.attend_packed(q, k, v, plan), (q, k, v), grad)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    truth = torch.autograd.grad(attention_ref(*wide, lens, scale), wide, grad.float())
    plain = torch.autograd.grad(attention_ref(q, k, v, lens, scale), (q, k, v), grad)
    for a, b, t, p in zip(found, again, truth, plain, strict=True):
        assert torch.equal(a, b)
        assert error(a, t) <= 2 * max(error(p, t), 3e-3)


@pytest.mark.parametrize("width", [64, 128, 576, 1024, 4096, 100])
def test_row_operations(width):
    x, weight = bf16(257, width), 1 + bf16(width, seed=1, scale=0.1)
    y = rms_norm(x, weight, 1e-6)
    truth = rms_norm_ref(x.double(), weight.double(), 1e-6)
    assert error(y, truth) <= 2 * error(rms_norm_ref(x, weight, 1e-6), truth)
    gate_up = bf16(257, 2 * width, seed=2)
    s = swiglu(gate_up)
    assert error(s, swiglu_ref(gate_up.double())) <= 2 * 3e-3
    for m in (1, 2, 7, 8, 9, 128, 255):
        assert torch.equal(rms_norm(x[:m], weight, 1e-6), y[:m])
        assert torch.equal(rms_norm(x[257 - m :], weight, 1e-6), y[257 - m :])
        assert torch.equal(swiglu(gate_up[:m]), s[:m])


def test_norm_of_strided_heads_and_gradients():
    qkv = bf16(50, 3, 8, 128)
    weight = (1 + bf16(128, seed=1, scale=0.1)).requires_grad_()
    heads = qkv[:, 1]
    assert torch.equal(rms_norm(heads, weight, 1e-6), rms_norm(heads.contiguous(), weight, 1e-6))
    x = heads.contiguous().requires_grad_()
    grad = bf16(50, 8, 128, seed=3)
    found = torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = torch.autograd.grad(rms_norm_ref(*wide, 1e-6), wide, grad.double())
    assert all(error(a, b) < 6e-3 for a, b in zip(found, truth, strict=True))


def test_rope_and_kv_write():
    table = rope_table(128, 1e6, 4096, device="cuda")
    positions = torch.randint(0, 4096, (77,), device="cuda")
    x = bf16(77, 9, 128)
    truth = rope_ref(x.double(), positions, table.double())
    assert error(rope(x, positions, table), truth) <= 2 * error(
        rope_ref(x, positions, table), truth
    )
    k, v = bf16(77, 3, 64), bf16(77, 3, 64, seed=1)
    kv_slots = torch.randperm(160, device="cuda")[:77]
    caches = [torch.zeros(10, 16, 3, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    kv_write(k, v, caches[0], caches[1], kv_slots)
    kv_write_ref(k, v, caches[2], caches[3], kv_slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("vocab", [331, 1024, 49152, 151936])
def test_vocabulary_operations(vocab):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(37, vocab, device="cuda", generator=generator) * 3
    lse = logsumexp(logits)
    torch.testing.assert_close(lse, logits.double().logsumexp(-1).float(), rtol=3e-7, atol=3e-6)
    seeds = torch.full((37,), -(2**62) + 5, device="cuda")
    positions = torch.arange(37, device="cuda") + 1000
    ids = torch.arange(37, device="cuda") * 3 - 2**61
    for greedy in (False, True):
        flags = torch.full((37,), greedy, device="cuda")
        tokens = draw(logits, seeds, positions, ids, flags)
        for m in (1, 2, 36):
            part = [x[:m] for x in (logits, seeds, positions, ids, flags)]
            assert torch.equal(draw(*part), tokens[:m])
            assert torch.equal(logsumexp(logits[:m]), lse[:m])
        noise = gumbel_noise(seeds.cpu(), positions.cpu(), ids.cpu(), vocab)
        scores = logits.cpu() + (0 if greedy else noise)
        chosen = scores.gather(1, tokens.cpu()[:, None])[:, 0]
        torch.testing.assert_close(chosen, scores.amax(-1), rtol=1e-6, atol=1e-6)


def test_draw_ties_go_to_the_lower_id():
    logits = torch.zeros(3, 49152, device="cuda")
    logits[1, 40000:] = 1
    logits[2, [5, 47000]] = 2
    keys = [torch.zeros(3, dtype=torch.int64, device="cuda")] * 3
    greedy = torch.ones(3, dtype=torch.bool, device="cuda")
    assert draw(logits, *keys, greedy).tolist() == [0, 40000, 5]


@pytest.mark.parametrize("vocab", [331, 49152])
def test_allowed_tokens_equal_the_cpu(vocab):
    """The thresholds found by bisection keep what the sort keeps."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, vocab, generator=generator) * 2
    logits[:, 7] = logits[:, 11]
    top_k = torch.tensor([0, 1, 5, 40] * 16)
    top_p = torch.tensor([1.0, 0.3, 0.9, 0.999] * 4).repeat_interleave(4)
    min_p = torch.tensor([0.0, 0.05, 0.0, 0.3] * 16)
    on_cpu = allowed_tokens(logits, top_k, top_p, min_p)
    found = allowed_tokens(*(x.cuda() for x in (logits, top_k, top_p, min_p))).cpu()
    different = (found != on_cpu).sum(-1)
    assert int((different > 1).sum()) == 0  # a mass within an ulp of top_p may move one token
    assert int((different > 0).sum()) <= 2


def test_logprob_and_gradients():
    """Against an fp64 reference, and equal bits in two runs and any chunk of rows."""
    hidden, weight = bf16(700, 256).requires_grad_(), bf16(2048, 256, seed=1, scale=0.1)
    weight = weight.requires_grad_()
    ids = torch.randint(0, 1500, (700,), device="cuda")
    temperature = torch.full((700,), 0.7, device="cuda")
    values, entropy = logprob(hidden, weight, ids, temperature, 1500)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    reference = torch.log_softmax(wide[0] @ wide[1][:1500].t() / 0.7, -1)
    truth = reference.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(values.double(), truth, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(
        entropy.double(), -(reference.exp() * reference).sum(-1), rtol=1e-4, atol=1e-4
    )
    grad = torch.randn(700, device="cuda")
    found = torch.autograd.grad(values, (hidden, weight), grad)
    again = torch.autograd.grad(
        logprob(hidden, weight, ids, temperature, 1500)[0], (hidden, weight), grad
    )
    expected = torch.autograd.grad(truth, wide, grad.double())
    for a, b, t in zip(found, again, expected, strict=True):
        assert torch.equal(a, b)
        assert error(a, t) < 6e-3
    part, _ = logprob(hidden[:5], weight, ids[:5], temperature[:5], 1500)
    assert torch.equal(part, values[:5])
