"""Attention of a training-time test's passes against one softmax over all scores."""

import pytest
import torch
from helpers import assert_same_bits, attention_of

from samebit.kernels.ttt_attention import ttt_attention, ttt_attention_ref

LENS = (1, 5, 64, 65, 15)


def inputs(num_passes, heads, dtype=torch.float32):
    """q, k, v, and each pass's key and value, by a seed."""
    num_heads, num_kv, head_dim = heads
    generator = torch.Generator().manual_seed(num_passes)
    shapes = [(sum(LENS), num_heads, head_dim)]
    shapes += [(sum(LENS), num_kv, head_dim)] * (2 + 2 * num_passes)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def run(function, tensors, packed):
    q, k, v, *own = tensors
    pairs = list(zip(own[::2], own[1::2], strict=True))
    return function(q, k, v, pairs, packed, 0.3)


@pytest.mark.parametrize("num_passes", [1, 3])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 10)], ids=str)
def test_values_and_gradients_are_those_of_one_softmax(num_passes, heads):
    """Within a few ulps of fp32, against the same in fp64; and the same bits again."""
    found = inputs(num_passes, heads)
    plan = attention_of(found[0], found[1]).plan_packed(LENS)
    exact = [x.detach().double().requires_grad_() for x in found]
    outputs = run(ttt_attention, found, plan), run(ttt_attention_ref, exact, LENS)
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=0, atol=2e-6)
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(9))
    own = torch.autograd.grad(outputs[0], found, grad)
    for a, b in zip(own, torch.autograd.grad(outputs[1], exact, grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5)
    again = torch.autograd.grad(run(ttt_attention, found, plan), found, grad)
    for a, b in zip(own, again, strict=True):
        assert_same_bits(a, b)


def test_a_column_sees_its_own_later_keys_alone():
    """Another column's later key, or a later column's first one, changes no bit of it."""
    tensors = [x.detach() for x in inputs(2, (4, 2, 16))]
    plan = attention_of(tensors[0], tensors[1]).plan_packed(LENS)
    before = run(ttt_attention, tensors, plan)
    column = 1 + 5 + 20  # of the third sequence
    tensors[3][column] += 1
    after = run(ttt_attention, tensors, plan)
    changed = (before != after).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == [column]
    tensors[1][column] += 1
    changed = (after != run(ttt_attention, tensors, plan)).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == list(range(column, 1 + 5 + 64))
