"""The digest's tiles: the GPU's kernel, by Triton's interpreter and on a GPU, against the CPU."""

import pytest
import torch
from digest_cases import awkward
from helpers import run_python

from samebit.weight_sync.digest import Digester, Part, weights_digest
from samebit.weight_sync.mapping import ParamSpec, RowBlock, plain


def test_tiles_in_tritons_interpreter():
    """The GPU's kernel by the CPU: every kind of load gives the CPU's sum, as parts and at once."""
    run_python(_TILES, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


_TILES = """
import torch
from samebit.weight_sync.coefficients import Coefficients
from samebit.weight_sync.digest import Digester
from samebit.weight_sync.digest_gpu import TileTable
from digest_cases import awkward, not_finite, signed

specs, params, parts = awkward("cpu")
table = Coefficients(specs, params)
whole = [table.of_param(spec.name, params[spec.name]) for spec in specs]
cut = [table.of_part(part.name, part.start, part.values) for part in parts]
digesters = Digester(specs, params), Digester(specs, params, parts)
for rectangles, digester in zip((whole, cut), digesters):
    tiles = TileTable(rectangles, table.table)
    total = torch.zeros(2, dtype=torch.int64)
    tiles.add(total)
    assert total.tolist() == [signed(digester.sum()), 0]
    for i, part in enumerate(rectangles):
        one = torch.zeros(2, dtype=torch.int64)
        tiles.add(one, i)
        digester.start()
        digester.add(i)
        assert one.tolist() == [signed(digester.finish()), 0], part
        for last in not_finite(part[-1]) if rectangles is cut else ():
            one = torch.zeros(2, dtype=torch.int64)
            tiles.add(one, i)
            assert int(one[1]) == 1, (part, last)
"""


@pytest.mark.gpu
def test_tiles_on_the_gpu():
    """Odd shapes, vectors, padding, strides, shards, rounded copies: what the CPU finds."""
    specs, params, parts = awkward("cuda")
    on_cpu = {name: p.cpu() for name, p in params.items()}
    assert weights_digest(specs, params) == weights_digest(specs, on_cpu)
    cpu_parts = [Part(part.name, part.start, part.values.cpu()) for part in parts]
    digester = Digester(specs, params, parts)
    expected = Digester(specs, on_cpu, cpu_parts)
    assert digester.digest() == expected.digest()
    assert digester.all_finite
    for i, part in enumerate(parts):
        for each in (digester, expected):
            each.start()
            each.add(i)
        assert digester.finish() == expected.finish(), part.name
        kept = part.values[-1].clone()
        part.values[-1] = torch.inf
        digester.start()
        digester.add(i)
        digester.finish()
        assert not digester.all_finite, part.name
        part.values[-1] = kept


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_tensors_on_the_gpu(dtype):
    """Beyond 16 MiB and beyond 2^31 elements, at row offsets: addresses are of 64 bits."""
    whole = torch.randn(4100, 4096, device="cuda").to(dtype)
    block = RowBlock(0, "x", 1 << 20, 4099)
    spec = ParamSpec("a", (4100, 4096), (block,), {"x": (1 << 21, 4096)})
    expected = weights_digest([spec], {"a": whole.cpu()})
    assert weights_digest([spec], {"a": whole}) == expected
    far = torch.empty(4100, 600_000, dtype=torch.bfloat16, device="cuda")[:, 4096:8192]
    far.copy_(whole)  # its last row begins beyond 2^31 elements
    narrow = whole.bfloat16()
    assert weights_digest([spec], {"a": far}) == weights_digest([spec], {"a": narrow.cpu()})
    part = Part("a", 5, whole.float().flatten()[5:-3].clone())
    on_cpu = Part("a", 5, part.values.cpu())
    found = Digester([spec], {"a": narrow}, [part]).digest()
    assert found == Digester([spec], {"a": narrow.cpu()}, [on_cpu]).digest()


@pytest.mark.gpu
def test_columns_apart_on_the_gpu():
    """Refused: a program would read the neighbours in memory."""
    with pytest.raises(ValueError, match="rows whose elements are neighbours"):
        weights_digest([plain("a", "x", (7, 5))], {"a": torch.zeros(5, 7, device="cuda").T})
