"""A product with a bias: one addition in fp32 to the finished sum, then the one rounding."""

import pytest
import torch
from helpers import assert_same_bits

from samebit.kernels.bias import add_bias, add_bias_ref, linear_with_bias
from samebit.kernels.linear import linear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MOST_ROWS = 513
ROW_COUNTS = (*range(1, 18), 31, 32, 33, 64, 100, 127, 128, 129, 191, 255, 256, 257, 384, MOST_ROWS)
# (N, K): odd sizes, and the qkv products of Qwen2.5-0.5B, -1.5B and -7B, of which one is halved.
SHAPES = ((33, 100), (96, 48), (331, 64))
GPU_SHAPES = ((331, 100), (1152, 896), (2048, 1536), (4608, 3584), (2304, 3584))
CASES = [("cpu", shape) for shape in SHAPES]
CASES += [pytest.param("cuda", shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]


def operands(device, shape, num_rows=MOST_ROWS):
    """x, weight and bias in the device's dtype; some biases are large, as Qwen2's are."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(num_rows, shape[1], generator=generator)
    weight = torch.randn(shape, generator=generator) * 0.05
    bias = torch.randn(shape[0], generator=generator)
    bias[::7] *= 50
    return [t.to(device, dtype) for t in (x, weight, bias)]


@pytest.mark.parametrize(("device", "shape"), CASES)
def test_it_is_added_to_the_unrounded_product(device, shape):
    """To the bit: a bias added to the rounded product would round twice."""
    x, weight, bias = operands(device, shape)
    found = linear_with_bias(x, weight, bias)
    assert found.dtype == x.dtype
    product = linear(x, weight, torch.float32)
    assert_same_bits(found, (product + bias.float()).to(x.dtype))
    assert_same_bits(found, add_bias_ref(product, bias, x.dtype))
    exact = x.double() @ weight.double().t() + bias.double()
    plain = torch.nn.functional.linear(x, weight, bias)
    ours, theirs = ((y.double() - exact).abs().max() for y in (found, plain))
    assert ours <= 2 * theirs + 1e-6
    if device == "cuda":
        assert not torch.equal(found, linear(x, weight) + bias), "two roundings do not show"


@pytest.mark.parametrize(("device", "shape"), CASES)
def test_a_rows_bits_are_its_own(device, shape):
    """At every number of rows, first and last ones: decode of one gives what a batch gives."""
    x, weight, bias = operands(device, shape)
    whole = linear_with_bias(x, weight, bias)
    for m in ROW_COUNTS:
        assert_same_bits(linear_with_bias(x[:m], weight, bias), whole[:m], m)
        assert_same_bits(linear_with_bias(x[-m:], weight, bias), whole[-m:], m)


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_hold_the_columns_of_the_whole(device):
    """A bias is split as its weight's rows are."""
    x, weight, bias = operands(device, (96, 48))
    whole = linear_with_bias(x, weight, bias)
    for size in (2, 4):
        parts = zip(weight.chunk(size), bias.chunk(size), strict=True)
        found = [linear_with_bias(x, w.contiguous(), b) for w, b in parts]
        torch.testing.assert_close(torch.cat(found, 1), whole)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_summed_in_fp32_and_repeat(device):
    """The bias's gradient over many rows, where sums in bf16 would stall; x's and the weight's are
    those of the plain product."""
    x, weight, bias = operands(device, (96, 48), num_rows=5000)
    grad = (torch.rand(5000, 96, generator=torch.Generator().manual_seed(1)) + 0.5).to(x)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found = torch.autograd.grad(linear_with_bias(*leaves), leaves, grad)
    again = torch.autograd.grad(linear_with_bias(*leaves), leaves, grad)
    plain = torch.autograd.grad(linear(*leaves[:2]), leaves[:2], grad)
    for a, b in zip(found, again, strict=True):
        assert_same_bits(a, b)
    for a, b in zip(found, plain, strict=False):
        assert_same_bits(a, b)
    exact = grad.double().sum(0)
    assert found[2].dtype == bias.dtype
    error = (found[2].double() - exact).abs() / exact
    assert error.max() <= max(torch.finfo(bias.dtype).eps, 4e-6)


def test_without_a_bias_it_is_linear():
    x, weight, _ = operands("cpu", (33, 100))
    assert_same_bits(linear_with_bias(x, weight, None), linear(x, weight))


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions_are_rows(device):
    """Also none at all."""
    x, weight, bias = operands(device, (96, 48), num_rows=21)
    flat = linear_with_bias(x, weight, bias)
    assert_same_bits(linear_with_bias(x.view(3, 7, 48), weight, bias).view(21, 96), flat)
    assert linear_with_bias(x[:0], weight, bias).shape == (0, 96)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_refused_on_the_cpu(dtype):
    with pytest.raises(ValueError, match=f"add_bias on the CPU takes torch.float32, got {dtype}"):
        add_bias(torch.zeros(3, 5), torch.zeros(5, dtype=dtype), torch.float32)
    with pytest.raises(NotImplementedError, match="add_bias has no implementation .*'meta'"):
        add_bias(torch.zeros(3, 5, device="meta"), torch.zeros(5, device="meta"), torch.float32)
