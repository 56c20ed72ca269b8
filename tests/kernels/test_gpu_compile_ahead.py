"""Kernels that are compiled ahead: not run in the block, and not compiled again after it."""

import pytest
import torch
import triton

from samebit.kernels.kv_write import kv_write

pytestmark = pytest.mark.gpu


def test_kernels_are_compiled_and_not_run(tmp_path, monkeypatch):
    from samebit.kernels.gpu.compile_ahead import compiling_ahead
    from samebit.kernels.gpu.kv_write import _kv_write_kernel

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))  # nothing is compiled there yet
    _kv_write_kernel.device_caches.clear()
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what)
    )
    keys, values = torch.randn(2, 5, 2, 64, device="cuda").bfloat16()
    slots = torch.arange(3, 8, device="cuda")
    caches = torch.zeros(2, 1, 16, 2, 64, device="cuda").bfloat16()
    with compiling_ahead():
        kv_write(keys, values, *caches, slots)
    assert not caches.any()
    count = len(compiled)
    assert count > 0
    kv_write(keys, values, *caches, slots)
    assert len(compiled) == count
    assert torch.equal(caches[0, 0, 3:8], keys)
    assert torch.equal(caches[1, 0, 3:8], values)
