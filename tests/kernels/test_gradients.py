"""Gradients of every differentiable operation against autograd in fp64, and the same bits twice."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, attention_of

from samebit.kernels.attention import attention_ref
from samebit.kernels.bias import linear_with_bias
from samebit.kernels.linear import add_product, linear, linear_in_segments
from samebit.kernels.logprob import logits_grad, logprob, token_stats
from samebit.kernels.rms_norm import add_rms_norm, rms_norm
from samebit.kernels.rope import rope, rope_table
from samebit.kernels.swiglu import swiglu

EPS = 1e-6
POSITIONS = torch.tensor([0, 5, 299, 17, 17, 64, 3])
TOKEN_IDS = torch.tensor([0, 30, 11, 11, 7, 2, 19])
TEMPERATURES = torch.tensor([1.0, 0.7, 1.3, 2.0, 1.0, 0.5, 1.0])
TABLE = rope_table(34, 10000.0, 300)
ATTENTION_LENS = (1, 5, 64, 65, 15)


def norm_plain(x, w):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w


def rope_plain(x):
    cos, sin = TABLE.to(x)[POSITIONS].unsqueeze(1).chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def swiglu_plain(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def logprob_plain(h, w):
    rows = (h @ w[:31].t() / TEMPERATURES.to(h)[:, None]).log_softmax(-1)
    return rows.gather(1, TOKEN_IDS[:, None]).squeeze(1)


def logprob_and_entropy(h, w):
    return torch.stack(logprob(h, w, TOKEN_IDS, TEMPERATURES, 31, entropy_grad=True))


def logprob_and_entropy_plain(h, w):
    rows = (h @ w[:31].t() / TEMPERATURES.to(h)[:, None]).log_softmax(-1)
    return torch.stack([logprob_plain(h, w), -(rows.exp() * rows).sum(-1)])


def attention_plain(q, k, v):
    """attention_ref without its rounding to fp32."""
    outputs, group = [], q.shape[1] // k.shape[1]
    for parts in zip(*(x.split(ATTENTION_LENS) for x in (q, k, v)), strict=True):
        heads = [x.transpose(0, 1) for x in parts]
        keys, values = (x.repeat_interleave(group, 0) for x in heads[1:])
        scores = heads[0] @ keys.transpose(1, 2) * 0.3
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append((weights @ values).transpose(0, 1))
    return torch.cat(outputs)


def attend(q, k, v):
    attention = attention_of(q, k, 0.3)
    return attention.attend_packed(q, k, v, attention.plan_packed(ATTENTION_LENS))


# name -> (operation, the same in plain torch, shapes of the inputs)
OPERATIONS = {
    "linear": (linear, lambda x, w: x @ w.t(), (7, 33), (20, 33)),
    "linear-3d": (linear, lambda x, w: x @ w.t(), (2, 9, 48), (33, 48)),
    "linear-bias": (linear_with_bias, lambda x, w, b: x @ w.t() + b, (7, 33), (20, 33), (20,)),
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS), norm_plain, (7, 100), (100,)),
    "head_norm": (lambda x, w: rms_norm(x, w, EPS), norm_plain, (7, 3, 33), (33,)),
    "add_rms_norm": (
        lambda x, r, w: torch.stack(add_rms_norm(x, r, w, EPS)),
        lambda x, r, w: torch.stack([norm_plain(x + r, w), x + r]),
        (7, 33),
        (7, 33),
        (33,),
    ),
    "rope": (lambda x: rope(x, POSITIONS, TABLE), rope_plain, (7, 3, 34)),
    "swiglu": (swiglu, swiglu_plain, (7, 66)),
    "logprob": (
        lambda h, w: logprob(h, w, TOKEN_IDS, TEMPERATURES, 31)[0],
        logprob_plain,
        (7, 20),
        (40, 20),
    ),
    "entropy": (
        lambda h, w: logprob_and_entropy(h, w)[1],
        lambda h, w: logprob_and_entropy_plain(h, w)[1],
        (7, 20),
        (40, 20),
    ),
    "logprob and entropy": (logprob_and_entropy, logprob_and_entropy_plain, (7, 20), (40, 20)),
    "attention-4/2": (attend, attention_plain, (150, 4, 16), (150, 2, 16), (150, 2, 16)),
    "attention-9/3": (attend, attention_plain, (150, 9, 10), (150, 3, 10), (150, 3, 10)),
    "attention-2/2": (attend, attention_plain, (150, 2, 33), (150, 2, 33), (150, 2, 33)),
}


@pytest.fixture(params=OPERATIONS)
def operation(request):
    """(operation, plain version, inputs, gradient of the output)."""
    run, plain, *shapes = OPERATIONS[request.param]
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    grad = torch.randn(plain(*inputs).shape, generator=generator)
    return run, plain, inputs, grad


def gradients(function, inputs, grad):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def test_gradients_are_as_good_as_plain_torch(operation):
    """At most twice the error of plain fp32 autograd (and 4 ulps of the largest element)."""
    run, plain, inputs, grad = operation
    found = gradients(run, inputs, grad)
    usual = gradients(plain, inputs, grad)
    exact = gradients(plain, [x.double() for x in inputs], grad.double())
    for i, (g, p, e) in enumerate(zip(found, usual, exact, strict=True)):
        assert g.dtype == torch.float32
        bar = 2 * (p - e).abs().max() + 4 * e.abs().max() * 2.0**-24
        assert (g - e).abs().max() <= bar, f"input {i}"


def test_gradients_repeat_themselves(operation):
    """A resumed run takes the same steps only if backward has no race and no state."""
    run, _, inputs, grad = operation
    first = gradients(run, inputs, grad)
    for _ in range(2):
        for a, b in zip(gradients(run, inputs, grad), first, strict=True):
            assert_same_bits(a, b)


def test_gradients_take_any_layout(operation):
    """Gradients that arrive expanded or transposed, as autograd makes them, are not misread."""
    run, _, inputs, grad = operation
    ones = torch.ones(()).expand(grad.shape)
    for a, b in zip(
        gradients(run, inputs, ones), gradients(run, inputs, ones.contiguous()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    turned = grad.transpose(0, -1).contiguous().transpose(0, -1)
    for a, b in zip(gradients(run, inputs, turned), gradients(run, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_each_input_alone(operation):
    """A frozen weight (or input) gets no gradient and changes none of the others."""
    run, _, inputs, grad = operation
    together = gradients(run, inputs, grad)
    for i in range(len(inputs)):
        leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate(inputs)]
        run(*leaves).backward(grad)
        assert_same_bits(leaves[i].grad, together[i])
        assert all(x.grad is None for j, x in enumerate(leaves) if j != i)


def test_no_gradient_reaches_the_vocabulary_padding():
    """Rows past vocab_size are padding: they must stay zero for ever."""
    weight = torch.randn(40, 20).requires_grad_()
    values, _ = logprob(torch.randn(7, 20), weight, TOKEN_IDS, TEMPERATURES, 31)
    values.sum().backward()
    assert weight.grad[:31].abs().min() > 0
    assert not weight.grad[31:].any()


def test_logit_gradients_of_a_rank_are_its_columns():
    """Tokens of lower and of higher ranks, whose logits are elsewhere, give no probability back."""
    logits = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)) * 2
    normalizer = (logits / TEMPERATURES[:, None]).logsumexp(-1)

    def gradient(columns, first):
        ids, grad = TOKEN_IDS - first, POSITIONS / 9
        return logits_grad(columns, TEMPERATURES, normalizer, ids, grad, torch.float32)

    whole, parts = gradient(logits, 0), logits.split(8, dim=1)
    found = [gradient(part, 8 * i) for i, part in enumerate(parts)]
    assert_same_bits(torch.cat(found, dim=1), whole)
    assert (whole.gather(1, TOKEN_IDS[:, None]).squeeze(1) > 0).tolist() == (POSITIONS > 0).tolist()


def test_entropies_of_a_rank_give_its_columns_gradients():
    """They are of the whole row, whatever part of it a rank holds."""
    logits = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)) * 2
    _, entropies, normalizer = token_stats(logits, TEMPERATURES, TOKEN_IDS, True)
    grad, entropy_grad = torch.zeros(7), POSITIONS / 9 - 1

    def gradient(columns):
        others = torch.full((7,), -1)
        last = grad, torch.float32, entropies, entropy_grad
        return logits_grad(columns, TEMPERATURES, normalizer, others, *last)

    whole = gradient(logits)
    assert_same_bits(torch.cat([gradient(x) for x in logits.split(8, dim=1)], dim=1), whole)
    leaf = logits.double().requires_grad_()
    rows = (leaf / TEMPERATURES[:, None]).log_softmax(-1)
    [exact] = torch.autograd.grad(-(rows.exp() * rows).sum(-1), leaf, entropy_grad.double())
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-6)
    assert whole.sum(-1).abs().max() < 1e-4  # a shift of all logits moves no entropy


def test_an_entropy_that_nobody_differentiates_moves_no_bit():
    """Neither of the log-probs nor, without a gradient of its own, of their gradients."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 20, generator=generator) for n in (7, 40))
    found = []
    for entropy_grad in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values, entropy = logprob(*leaves, TOKEN_IDS, TEMPERATURES, 31, entropy_grad=entropy_grad)
        assert entropy.requires_grad is entropy_grad
        values.sin().sum().backward()
        found.append((entropy.detach(), values.detach(), *(x.grad for x in leaves)))
    (entropy, *others), (again, *others_again) = found
    torch.testing.assert_close(entropy, again, rtol=1e-4, atol=1e-4)
    for a, b in zip(others, others_again, strict=True):
        assert_same_bits(a, b)


def test_attention_gradients_match_its_reference():
    """attention_ref, the documented meaning, in fp32."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((150, 6, 16), (150, 2, 16), (150, 2, 16))
    inputs = [torch.randn(s, generator=generator) for s in shapes]
    grad = torch.randn(shapes[0], generator=generator)

    def reference(q, k, v):
        return attention_ref(q, k, v, ATTENTION_LENS, 0.3)

    torch.testing.assert_close(attend(*inputs), reference(*inputs), rtol=1e-5, atol=2e-6)
    expected = gradients(reference, inputs, grad)
    for a, b in zip(gradients(attend, inputs, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_attention_gradients_stay_in_their_sequence():
    """A loss on one sequence moves no other sequence of the pack."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(150, 2, 16, generator=generator) for _ in range(3)]
    grad = torch.zeros(150, 2, 16)
    start = sum(ATTENTION_LENS[:2])
    grad[start : start + 64] = 1.0
    for g in gradients(attend, inputs, grad):
        assert not g[:start].any()
        assert not g[start + 64 :].any()
        assert g[start : start + 64].any()


BUFFERED = {
    "linear": lambda x, w, buffer: linear(x, w, main_grad=buffer),
    "linear_in_segments": lambda x, w, buffer: linear_in_segments(x, w, 4, buffer),
    "logprob": lambda x, w, buffer: logprob(x, w, TOKEN_IDS, TEMPERATURES, 31, main_grad=buffer)[0],
}


@pytest.mark.parametrize("name", BUFFERED)
def test_a_trainers_buffer_gets_the_gradient(name):
    """What autograd is else given is added to what the buffer holds; the input's stays."""
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(n, 20, generator=generator) for n in (7, 40))
    run = BUFFERED[name]
    plain = gradients(lambda a, b: run(a, b, None).sin().sum(), (x, weight), torch.ones(()))
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    buffer = torch.full((40, 20), 2.0)
    run(*leaves, buffer).sin().sum().backward()
    assert_same_bits(leaves[0].grad, plain[0])
    assert leaves[1].grad is None
    assert_same_bits(buffer, plain[1] + 2)


def test_products_without_rows_or_columns():
    """A rank that holds no row of a small vocabulary still takes part."""
    x, weight = torch.ones(5, 8, requires_grad=True), torch.ones(0, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert torch.equal(x.grad, torch.zeros(5, 8))
    assert weight.grad.shape == (0, 8)
    total = torch.ones(3, 8)
    add_product(total[:0], torch.ones(0, 5), torch.ones(5, 8))
    add_product(total, torch.ones(3, 0), torch.ones(0, 8))
    assert torch.equal(total, torch.ones(3, 8))
