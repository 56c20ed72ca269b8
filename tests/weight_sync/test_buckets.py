"""Buckets: bounded, aligned, in order, and what was packed comes out again."""

import pytest
import torch

from samebit.weight_sync.buckets import cut_buckets, empty_bucket, pack
from samebit.weight_sync.types import WeightSyncError


def tensors(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(n, generator=generator).to(dtype) for i, n in enumerate(sizes)}


def num_bytes(metas):
    return len(empty_bucket(metas, torch.device("cpu")).buffer)


@pytest.mark.parametrize("limit", [1, 64, 100, 256, 1000, 1 << 20])
def test_buckets_keep_order_limit_and_alignment(limit):
    """A reordered or doubled tensor, or a bucket above the limit, would break a receiver."""
    params = tensors(3, 16, 17, 1, 64, 5, 5, 200, 2)
    buckets = cut_buckets(params, limit)
    assert [meta.name for metas in buckets for meta in metas] == list(params)
    for metas in buckets:
        assert metas[0].offset == 0
        assert all(meta.offset % 64 == 0 for meta in metas)
        assert num_bytes(metas) <= limit or len(metas) == 1
    for metas, following in zip(buckets, buckets[1:], strict=False):
        end = -(-num_bytes(metas) // 64) * 64
        assert end + params[following[0].name].numel() * 4 > limit, "a bucket was closed too early"


def test_a_tensor_above_the_limit_travels_alone():
    """One huge embedding must neither be refused nor take neighbours with it."""
    buckets = cut_buckets(tensors(4, 1000, 4), 64)
    assert [[meta.name for meta in metas] for metas in buckets] == [["t0"], ["t1"], ["t2"]]


def test_a_full_bucket_is_full():
    """Tensors that fit to the last byte share a bucket."""
    assert len(cut_buckets(tensors(16, 16), 128)) == 1
    assert len(cut_buckets(tensors(16, 17), 128)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_tensors_come_out_with_the_same_bits(dtype):
    """Overlapping offsets or a wrong view would damage weights on their way."""
    params = {
        "matrix": torch.randn(7, 5).to(dtype),
        "vector": torch.tensor([torch.inf, -0.0, torch.nan]).to(dtype),
        "transposed": torch.randn(6, 4).to(dtype).T,
    }
    [metas] = cut_buckets(params, 1 << 20)
    bucket = pack(metas, params)
    kind = torch.int32 if dtype is torch.float32 else torch.int16
    for meta in metas:
        expected = params[meta.name].contiguous()
        assert bucket.tensor(meta).dtype is dtype
        assert torch.equal(bucket.tensor(meta).view(kind), expected.view(kind)), meta.name


def test_no_parameters_make_no_bucket_and_bad_limits_are_refused():
    """An endless loop or an empty bucket would hang the receivers."""
    assert cut_buckets({}, 100) == []
    with pytest.raises(ValueError, match="bucket_bytes must be positive, got 0"):
        cut_buckets(tensors(1), 0)


def test_a_large_tensor_travels_alone_and_is_not_copied():
    """From 1 MiB on its bucket is its own memory; small neighbours still share one."""
    params = tensors(4, 4, 1 << 18, 4, (1 << 18) - 1)
    buckets = cut_buckets(params, 1 << 30)
    assert [[meta.name for meta in metas] for metas in buckets] == [
        *(["t0", "t1"], ["t2"], ["t3", "t4"])
    ]
    [small, large, _] = [pack(metas, params) for metas in buckets]
    assert large.buffer.data_ptr() == params["t2"].data_ptr()
    assert len(large.buffer) == 1 << 20
    assert torch.equal(large.tensor(buckets[1][0]), params["t2"])
    assert small.buffer.data_ptr() != params["t0"].data_ptr()
    columns = {"t": torch.randn(4, 6)[:, 2:]}  # not contiguous
    [metas] = cut_buckets(columns, 1)
    packed = pack(metas, columns)
    assert packed.buffer.data_ptr() != columns["t"].data_ptr()
    assert torch.equal(packed.tensor(metas[0]), columns["t"])


@pytest.mark.parametrize("other", [torch.zeros(2), torch.zeros(3, dtype=torch.bfloat16)])
def test_what_a_receiver_has_otherwise_is_not_packed(other):
    """To copy it would repeat or round it."""
    [metas] = cut_buckets({"a": torch.zeros(3)}, 100)
    with pytest.raises(WeightSyncError, match=r"a is .* here and \(3,\) torch.float32 at the rec"):
        pack(metas, {"a": other})
