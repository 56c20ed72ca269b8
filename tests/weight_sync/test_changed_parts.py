"""Parcels of a delta, without a group: positions and bits of what has changed."""

import pytest
import torch

from samebit.weight_sync.transports.delta import Base, only_changes
from samebit.weight_sync.transports.peers import Parts, Round
from samebit.weight_sync.types import ParamMeta

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits(tensor):
    return tensor.view(BITS[tensor.dtype.itemsize])


def region(shape, dtype, kind):
    """Random bits; "columns" is a strided view of a wider matrix."""
    wide = (*shape[:-1], shape[-1] + 3) if kind == "columns" else shape
    size = torch.Size(wide).numel() * dtype.itemsize
    whole = torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).view(wide)
    return whole[..., 2:-1] if kind == "columns" else whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("kind", ["whole", "columns"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 1.0])
def test_any_bits_arrive_in_any_layout(dtype, kind, share):
    """Random bits are also NaN, infinities and -0.0; both ends differ in layout."""
    torch.manual_seed(1)
    metas, before, now, there = [], {}, [], []
    for i, shape in enumerate([(40, 51), (2000,), (1, 700), (700, 1), (3, 5)]):
        name, old = f"p{i}", region(shape, dtype, kind)
        new = old.clone()
        chosen = torch.rand(shape) < share
        bits(new)[chosen] ^= 1
        target = region(shape, dtype, "columns" if kind == "whole" and len(shape) > 1 else "whole")
        metas.append(ParamMeta(name, shape, str(dtype), 0))
        before[name] = old.clone()
        now.append(new)
        there.append(target.copy_(old))
    base = Base(before)
    base.keep(before)
    planned = sum(-(-view.nbytes // 64) * 64 for view in now)
    here, other = (
        Round((Parts(1, tuple(metas), tuple(now), planned),), ()),
        Round((), (Parts(0, tuple(metas), tuple(there), planned),)),
    )
    told = [base.count_changes([here]), {}]
    changes = [
        int((bits(n) != bits(before[m.name])).sum()) for m, n in zip(metas, now, strict=True)
    ]
    assert told[0] == {1: changes}
    rounds = zip(
        only_changes([here], 0, told, base.region),
        only_changes([other], 1, told, lambda _: None),
        strict=True,
    )
    sent = 0
    for going, coming in rounds:
        for parts, arriving in zip(going.outgoing, coming.incoming, strict=True):
            assert (parts.metas, parts.num_bytes) == (arriving.metas, arriving.num_bytes)
            assert parts.num_bytes <= planned
            buffer = torch.empty(parts.num_bytes, dtype=torch.uint8)
            parts.pack(buffer)
            arriving.unpack(buffer)
            sent += sum(view.nbytes for view in parts.views)
    for new, target in zip(now, there, strict=True):
        assert torch.equal(bits(new), bits(target))
    if share in (0.0, 1.0):
        assert sent == share * sum(new.nbytes for new in now)
    elif share == 0.01:
        assert 0 < sent < sum(new.nbytes for new in now) / 4


def test_all_receivers_of_a_region_get_its_changes():
    """The copy is brought up to date behind the last of them only."""
    before, now = {"p": torch.zeros(500)}, torch.zeros(500)
    now[7] = -0.0
    base, meta = Base(before), ParamMeta("p", (500,), "torch.float32", 0)
    base.keep(before)
    rounds = [Round((Parts(peer, (meta,), (now,), 2000),), ()) for peer in (1, 2)]
    told = [base.count_changes(rounds)]
    assert told == [{1: [1], 2: [1]}]
    found = [r.outgoing[0] for r in only_changes(rounds, 0, told, base.region)]
    assert [[view.tolist() for view in parts.views] for parts in found] == [[[7], [-(2**31)]]] * 2
    base.keep({"p": now})
    assert base.count_changes(rounds) == {1: [0], 2: [0]}
