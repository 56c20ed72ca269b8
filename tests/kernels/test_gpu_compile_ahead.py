"""Kernels that are compiled ahead: not run in the block, and not compiled again after it."""

import pytest
import torch
import triton
from helpers import assert_same_bits

from samebit.kernels.rms_norm import rms_norm

pytestmark = pytest.mark.gpu


def test_kernels_are_compiled_and_not_run(tmp_path, monkeypatch):
    from samebit.kernels.gpu.compile_ahead import compiling_ahead
    from samebit.kernels.gpu.rms_norm import _rms_norm_kernel

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))  # nothing is compiled there yet
    _rms_norm_kernel.device_caches.clear()
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what)
    )
    x, weight = torch.randn(5, 96, device="cuda").bfloat16(), torch.ones(96, device="cuda")
    weight = weight.bfloat16()
    with compiling_ahead():
        rms_norm(x, weight, 1e-6)
    count = len(compiled)
    assert count > 0
    found = rms_norm(x, weight, 1e-6)
    assert len(compiled) == count
    assert_same_bits(found, rms_norm(x.clone(), weight, 1e-6), "again")
    wide = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(found.double(), wide, rtol=1e-2, atol=1e-2)
