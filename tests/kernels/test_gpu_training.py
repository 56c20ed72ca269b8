"""Gradient kernels on the card, and the statistics of logits that training needs."""

import pytest
import torch
from helpers import attention_of

from samebit.kernels.attention import attention_ref
from samebit.kernels.linear import add_product, linear, linear_in_segments
from samebit.kernels.logprob import (
    logits_grad,
    logits_grad_ref,
    logprob,
    logprob_of,
    token_stats,
)
from samebit.kernels.rms_norm import rms_norm, rms_norm_backward_ref
from samebit.kernels.sample import draw_with_logprobs, least_allowed
from samebit.kernels.swiglu import swiglu, swiglu_backward_ref
from samebit.kernels.truncation import Thresholds, kept_sets_of
from samebit.kernels.ttt_attention import ttt_attention, ttt_attention_ref
from samebit.trainer.context import chunks_of

if torch.cuda.is_available():
    from samebit.kernels.gpu.attention import attend
    from samebit.kernels.gpu.attention_backward import attend_backward

pytestmark = pytest.mark.gpu


def bf16(*shape, seed=0, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, device="cuda", generator=generator) * scale).to(torch.bfloat16)


def assert_near(found, wide, *narrow):
    """At most twice the error of plain torch in bf16, to an fp64 reference."""
    for a, truth, plain in zip(found, wide, narrow, strict=True):
        ours, theirs = ((x.double() - truth).abs().max() for x in (a, plain))
        assert ours <= 2 * theirs + 1e-6 * truth.abs().max(), (ours, theirs)


@pytest.mark.parametrize("shape", [(1, 64), (700, 2560), (37, 100), (300, 32, 128), (9, 5000)])
def test_rms_norm_backward(shape):
    x, grad, weight = bf16(*shape), bf16(*shape, seed=1), 1 + bf16(shape[-1], seed=2, scale=0.1)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    found = torch.autograd.grad(rms_norm(x, weight, 1e-6), leaves, grad)
    again = torch.autograd.grad(rms_norm(x, weight, 1e-6), leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    inverse = torch.rsqrt(x.detach().float().square().mean(-1, keepdim=True) + 1e-6)
    plain = rms_norm_backward_ref(grad, x.detach(), weight.detach(), inverse)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + 1e-6) * wide[1]
    assert_near(found, torch.autograd.grad(y, wide, grad.double()), *plain)


def test_rms_norm_backward_of_heads_that_lie_apart():
    x, weight, grad = bf16(67, 3, 5, 64), bf16(64, seed=1), bf16(67, 5, 64, seed=2)
    found = torch.autograd.grad(rms_norm(x.requires_grad_()[:, 1], weight, 1e-6), x, grad)[0]
    alone = x.detach()[:, 1].contiguous().requires_grad_()
    expected = torch.autograd.grad(rms_norm(alone, weight, 1e-6), alone, grad)[0]
    assert torch.equal(found[:, 1], expected)
    assert not found[:, [0, 2]].any()


@pytest.mark.parametrize("shape", [(1, 64), (300, 2 * 9728), (3, 7, 200)])
def test_swiglu_backward(shape):
    x, grad = bf16(*shape, scale=2.0).requires_grad_(), bf16(*shape[:-1], shape[-1] // 2, seed=1)
    found = torch.autograd.grad(swiglu(x), x, grad)[0]
    wide = x.detach().double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    truth = torch.autograd.grad(torch.nn.functional.silu(gate) * up, wide, grad.double())[0]
    assert_near([found], [truth], swiglu_backward_ref(grad, x.detach()))


@pytest.mark.parametrize("vocab", [331, 1024, 49152, 151936])
def test_token_stats_have_the_samplers_bits(vocab):
    rows, generator = 70, torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(rows, vocab, device="cuda", generator=generator) * 3
    temperature = torch.rand(rows, device="cuda", generator=generator) + 0.3
    keys = [torch.arange(rows, device="cuda") + i for i in range(3)]
    greedy = torch.zeros(rows, dtype=torch.bool, device="cuda")
    tokens, logprobs = draw_with_logprobs(logits, temperature, *keys, greedy)
    found, entropies, normalizers = token_stats(logits, temperature, tokens)
    assert torch.equal(found, logprobs)
    scaled = logits / temperature[:, None]
    assert torch.equal(found, logprob_of(scaled, tokens))
    truth = scaled.double().log_softmax(-1)
    torch.testing.assert_close(
        entropies.double(), -(truth.exp() * truth).sum(-1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        normalizers.double(), scaled.double().logsumexp(-1), rtol=1e-6, atol=1e-6
    )
    grad = torch.randn(rows, device="cuda", generator=generator)
    ids = tokens.clone()
    ids[:2] = torch.tensor([-3, vocab])  # other ranks' tokens
    arguments = (logits, temperature, normalizers, ids, grad)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
        expected = logits_grad_ref(*arguments, torch.float32)
        torch.testing.assert_close(
            logits_grad(*arguments, dtype).float(), expected, rtol=error, atol=1e-6
        )


@pytest.mark.parametrize("vocab", [331, 49152, 151936])
def test_gradients_of_entropies(vocab):
    """Against autograd in fp64; the log-probs' own gradients keep their bits."""
    rows, generator = 40, torch.Generator("cuda").manual_seed(1)
    logits = torch.randn(rows, vocab, device="cuda", generator=generator) * 3
    temperature = torch.rand(rows, device="cuda", generator=generator) + 0.3
    ids = torch.randint(vocab, (rows,), device="cuda", generator=generator)
    grad, entropy_grad = torch.randn(2, rows, device="cuda", generator=generator)
    _, entropies, normalizers = token_stats(logits, temperature, ids)
    arguments = (logits, temperature, normalizers, ids)
    found = logits_grad(*arguments, grad, torch.float32, entropies, entropy_grad)
    leaf = logits.double().requires_grad_()
    scaled = (leaf / temperature[:, None]).log_softmax(-1)
    chosen = scaled.gather(1, ids[:, None]).squeeze(1)
    total = (chosen * grad).sum() - ((scaled.exp() * scaled).sum(-1) * entropy_grad).sum()
    [truth] = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-6)
    expected = logits_grad_ref(*arguments, grad, torch.float32, entropies, entropy_grad)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    plain = logits_grad(*arguments, grad, torch.float32)
    none = torch.zeros_like(grad)
    assert torch.equal(logits_grad(*arguments, grad, torch.float32, entropies, none), plain)


def test_logits_of_minus_infinity_add_nothing_to_the_entropy():
    logits = torch.full((2, 3000), float("-inf"), device="cuda")
    logits[:, ::100] = 1.0
    ones, ids = torch.ones(2, device="cuda"), torch.tensor([500, 2900], device="cuda")
    logprobs, entropies, _ = token_stats(logits, ones, ids)
    expected = torch.full((2,), 30.0).log()
    torch.testing.assert_close(entropies.cpu(), expected)
    torch.testing.assert_close(logprobs.cpu(), -expected)


def test_a_trainers_buffer_gets_unrounded_gradients():
    """Of a weight that both linear and logprob use, over two micro-batches; autograd gets none."""
    weight = bf16(2048, 256, scale=0.1).requires_grad_()
    main_grad = torch.zeros(2048, 256, device="cuda")
    truth = torch.zeros(2048, 256, device="cuda", dtype=torch.float64)
    ids, ones = torch.arange(300, device="cuda"), torch.ones(300, device="cuda")
    for seed in (1, 2):
        x, grad = bf16(300, 256, seed=seed), bf16(300, 2048, seed=seed + 5)
        linear(x, weight, main_grad=main_grad).backward(grad)
        truth += grad.double().t() @ x.double()
        values, _ = logprob(x, weight, ids, ones, 1500, main_grad=main_grad)
        values.sum().backward()
        wide = weight.detach()[:1500].double().requires_grad_()
        chosen = (x.double() @ wide.t()).log_softmax(-1).gather(1, ids[:, None])
        truth[:1500] += torch.autograd.grad(chosen.sum(), wide)[0]
    assert weight.grad is None
    assert (main_grad - truth).norm() < 2e-3 * truth.norm()
    plain = (bf16(300, 2048, seed=6).t() @ bf16(300, 256, seed=1)).double()
    exact = bf16(300, 2048, seed=6).double().t() @ bf16(300, 256, seed=1).double()
    main_grad.zero_()
    y = linear(bf16(300, 256, seed=1), weight, main_grad=main_grad)
    y.backward(bf16(300, 2048, seed=6))
    assert (main_grad - exact).norm() < (plain - exact).norm() / 100


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_a_rank_without_a_column_of_the_vocabulary(rows):
    """Of a small vocabulary whole shards are padding: every product of the loss is empty there."""
    hidden, weight = bf16(rows, 256), bf16(512, 256)[:0]
    found = linear(hidden, weight, torch.float32)
    assert (found.shape, found.dtype) == ((rows, 0), torch.float32)
    assert linear(hidden, weight).dtype == torch.bfloat16
    assert linear_in_segments(hidden, weight, 8).shape == (rows, 0)
    ones, ids = torch.ones(rows, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
    narrow = logits_grad(found, ones, ones, ids - 512, ones, torch.bfloat16)
    assert narrow.shape == (rows, 0)
    assert torch.equal(narrow @ weight, torch.zeros_like(hidden))
    total = torch.ones(512, 256, device="cuda")
    add_product(total[:0], narrow.t(), hidden)
    add_product(total, bf16(0, 512).t(), bf16(0, 256))
    assert torch.equal(total, torch.ones_like(total))


@pytest.mark.parametrize(
    ("heads", "kv", "lens"), [(32, 8, (700,)), (9, 3, (513,)), (16, 8, (65, 1, 300)), (4, 4, (9,))]
)
def test_attention_backward_with_filling_heads(heads, kv, lens):
    """Heads that only fill the card leave every gradient what it is."""
    q, k, v = (bf16(sum(lens), n, 128, seed=i) for i, n in enumerate((heads, kv, kv)))
    grad, plan = bf16(sum(lens), heads, 128, seed=3), attention_of(q, k).plan_packed(lens)
    output, lse = attend(q, k, v, plan, 128**-0.5)
    found = attend_backward(grad, q, k, v, output, lse, plan, 128**-0.5)
    again = attend_backward(grad, q, k, v, output, lse, plan, 128**-0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    truth = torch.autograd.grad(attention_ref(*wide, lens, 128**-0.5), wide, grad.float())
    narrow = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = torch.autograd.grad(attention_ref(*narrow, lens, 128**-0.5), narrow, grad)
    for a, t, p in zip(found, truth, plain, strict=True):
        assert (a.float() - t).norm() <= 2 * (p.float() - t).norm()


@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 4, 128)], ids=str)
def test_ttt_attention(heads):
    """Values and gradients of three passes; the same bits again."""
    num_heads, num_kv, head_dim = heads
    lens, scale = (1, 130, 700), head_dim**-0.5
    shapes = [(sum(lens), n, head_dim) for n in (num_heads, *[num_kv] * 8)]
    leaves = [bf16(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    grad, plan = bf16(*shapes[0], seed=99), attention_of(*leaves[:2]).plan_packed(lens)

    def run(function, tensors, packed):
        q, k, v, *own = tensors
        return function(q, k, v, list(zip(own[::2], own[1::2], strict=True)), packed, scale)

    output = run(ttt_attention, leaves, plan)
    found = torch.autograd.grad(output, leaves, grad)
    again = torch.autograd.grad(run(ttt_attention, leaves, plan), leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth, plain = run(ttt_attention_ref, wide, lens), run(ttt_attention_ref, leaves, lens)
    assert_near([output], [truth], plain)
    expected = torch.autograd.grad(truth, wide, grad.double())
    assert_near(found, expected, *torch.autograd.grad(plain, leaves, grad))


@pytest.mark.parametrize("lens", [(700,), (65, 300, 2100), (5, 1030), (2, 2), (2,)])
def test_attention_of_context_parallel_shares(lens):
    """Two ranks' parts have the whole's outputs; their gradients add up to the whole's."""
    heads, kv, scale = 16, 8, 128**-0.5
    q, k, v = (bf16(sum(lens), n, 128, seed=i) for i, n in enumerate((heads, kv, kv)))
    grad, plan = bf16(sum(lens), heads, 128, seed=3), attention_of(q, k).plan_packed(lens)
    output, lse = attend(q, k, v, plan, scale)
    truth = attend_backward(grad, q, k, v, output, lse, plan, scale)
    found = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
    starts = [sum(lens[:i]) for i in range(len(lens))]
    for rank in range(2):
        parts = [
            (start, *chunk)
            for start, n in zip(starts, lens, strict=True)
            for chunk in chunks_of(n, rank, 2)
            if chunk[0] < chunk[1]
        ]
        rows = torch.cat([torch.arange(s + a, s + b, device="cuda") for s, a, b in parts])
        share = attention_of(q, k).plan_context(
            [b - a for _, a, b in parts], [b for _, _, b in parts], [s for s, _, _ in parts],
            sum(lens),
        )  # fmt: skip
        own, own_lse = attend(q[rows], k, v, share, scale)
        assert torch.equal(own, output[rows])
        assert torch.equal(own_lse, lse[:, rows])
        grads = attend_backward(grad[rows], q[rows], k, v, own, own_lse, share, scale)
        again = attend_backward(grad[rows], q[rows], k, v, own, own_lse, share, scale)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        found[0][rows] = grads[0].float()
        found[1] += grads[1]
        found[2] += grads[2]
    for a, b in zip(found, truth, strict=True):
        assert (a - b.float()).norm() < 4e-3 * b.float().norm()


@pytest.mark.parametrize("vocab", [331, 49152, 151936])
def test_truncated_rows_have_the_samplers_bits(vocab):
    """By thresholds and by sets; a kept set may leave whole segments without a token."""
    rows, generator = 40, torch.Generator("cuda").manual_seed(2)
    logits = torch.randn(rows, vocab, device="cuda", generator=generator) * 3
    temperature = torch.rand(rows, device="cuda", generator=generator) + 0.3
    scaled = logits / temperature[:, None]
    top_k = torch.tensor([0, 1, 2, 40] * 10, device="cuda")
    top_p = torch.linspace(0.2, 1.0, rows, device="cuda")
    least = least_allowed(scaled, top_k, top_p, torch.full_like(top_p, 0.001))
    mask = scaled >= least[:, None]
    ids, expected = mask.int().argmax(-1), scaled.masked_fill(~mask, float("-inf"))
    thresholds = Thresholds(least)
    sets = kept_sets_of(logits, temperature, thresholds)
    grad, entropy_grad = torch.randn(2, rows, device="cuda", generator=generator)
    leaf = logits.double().requires_grad_()
    exact = (leaf / temperature[:, None]).masked_fill(~mask, float("-inf")).log_softmax(-1)
    entropy = -(exact.exp() * exact.masked_fill(~mask, 0.0)).sum(-1)
    chosen = exact.gather(1, ids[:, None]).squeeze(1)
    [truth] = torch.autograd.grad((chosen * grad + entropy * entropy_grad).sum(), leaf)
    for kept in (thresholds, sets):
        restricted = kept.restrict(logits.clone(), temperature)
        logprobs, entropies, normalizers = token_stats(restricted, temperature, ids, True)
        assert torch.equal(logprobs, logprob_of(expected, ids))
        torch.testing.assert_close(entropies.double(), entropy, rtol=1e-5, atol=1e-5)
        last = grad, torch.float32, entropies, entropy_grad
        found = logits_grad(restricted, temperature, normalizers, ids, *last)
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)
