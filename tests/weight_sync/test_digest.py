"""weights_digest: one value for one set of weights in any layout, another for any other set."""

import hashlib
import struct
from dataclasses import replace

import pytest
import torch
from digest_cases import TIES

from samebit.rollout.models.decoder import EMBEDDING
from samebit.rollout.models.qwen2 import Qwen2
from samebit.rollout.models.qwen3 import Qwen3
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_dummy
from samebit.weight_sync.digest import Digester, Part, as_digest, digest_sum, weights_digest
from samebit.weight_sync.mapping import (
    ParamSpec,
    RowBlock,
    hf_tensors,
    load_params,
    parts_of,
    plain,
)

MASK = (1 << 64) - 1


@pytest.fixture(scope="module")
def specs(qwen3_path):
    return load_model_config(qwen3_path).param_specs()


@pytest.fixture
def params(specs):
    params = {spec.name: torch.empty(spec.shape) for spec in specs}
    load_dummy(specs, params, seed=3)
    return params


def mix(x):
    """splitmix64's finalizer."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def by_the_book(name, dtype, rows):
    """The formula of the module's docstring, in Python's integers."""
    key = int.from_bytes(hashlib.blake2b(f"{name}:{dtype}".encode(), digest_size=8).digest())
    total = 0
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            bits = int.from_bytes(struct.pack("<f", value), "little")
            bits >>= 16 if dtype is torch.bfloat16 else 0
            in_row = mix(key + (i + 1) * 0x9E3779B97F4A7C15 & MASK) | 1
            in_column = mix((j + 1) * 0xD6E8FEB86659FD93 & MASK) | 1
            total += (bits + 1) * in_row * in_column
    return total & MASK


def test_the_formula_is_the_documented_one():
    """Digests stand in checkpoints and reports: another formula would make them incomparable."""
    values = torch.tensor([[0.0, -0.0, 1.5], [-3.25e-30, 7e30, 1e-45]])
    specs = [plain("a", "x.weight", (2, 3))]
    expected = by_the_book("x.weight", torch.float32, values.tolist())
    assert digest_sum(specs, {"a": values}) == expected
    assert weights_digest(specs, {"a": values}) == f"{expected:016x}"
    values = values.bfloat16()
    expected = by_the_book("x.weight", torch.bfloat16, values.tolist())
    assert weights_digest(specs, {"a": values}) == f"{expected:016x}"


def test_a_digest_by_its_value():
    """So that no change of the formula and of its copy above passes together."""
    specs = [plain("a", "x.weight", (2, 3)), plain("b", "y", (2,))]
    params = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([-1.0, 0.5])}
    assert weights_digest(specs, params) == "2caa50ad7b26da38"


def test_digests_are_pinned():
    """Two shapes and two dtypes of the same values; computed once by the book."""
    values = torch.arange(6.0).view(2, 3) - 2.5
    matrix, vector = [plain("a", "x.weight", (2, 3))], [plain("a", "norm.weight", (6,))]
    assert weights_digest(matrix, {"a": values}) == "506bcb8677817028"
    assert weights_digest(matrix, {"a": values.bfloat16()}) == "2810b972d595c936"
    assert weights_digest(vector, {"a": values.flatten()}) == "7c9f98867e491794"
    by_hand = by_the_book("norm.weight", torch.float32, values.view(6, 1).tolist())
    assert f"{by_hand:016x}" == "7c9f98867e491794"


def test_layout_does_not_matter(specs, params):
    """Interleaved and stacked rows, padding, order: the same weights have the same digest."""
    whole = weights_digest(specs, params)
    tensors = dict(hf_tensors(specs, params))
    as_stored = [plain(name, name, tuple(t.shape)) for name, t in tensors.items()]
    assert weights_digest(as_stored, tensors) == whole
    assert weights_digest(list(reversed(specs)), params) == whole


@pytest.mark.parametrize("family", [Qwen3, Qwen2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_add_up_to_the_whole(size, family):
    """A digest that depends on the tensor parallel size would refuse every resharded update."""
    config = sharded_config(family)
    specs = config.param_specs()
    params = {spec.name: torch.empty(spec.shape) for spec in specs}
    load_dummy(specs, params, seed=3)
    tensors = dict(hf_tensors(specs, params))
    total = 0
    for rank in range(size):
        own = config.param_specs((rank, size))
        shard = {spec.name: torch.empty(spec.shape) for spec in own}
        load_params(own, shard, parts_of(tensors.__getitem__))
        total += digest_sum(own, shard)
    assert total & MASK == digest_sum(specs, params)


def sharded_config(family=Qwen3):
    return family(
        architecture=family.family.architecture,
        num_layers=1,
        hidden_size=20,
        num_heads=8,
        num_kv_heads=4,
        head_dim=6,
        ffn_size=36,
        vocab_size=331,
        max_position=64,
        norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        tie_embeddings=False,
        eos_token_ids=(0,),
    )


def test_a_tensor_of_many_chunks_is_hashed_by_position():
    """An error in the chunks' first rows or columns would only show in large tensors."""
    tensor = torch.randn(700, 300, generator=torch.Generator().manual_seed(0))
    whole = weights_digest([plain("a", "x", (700, 300))], {"a": tensor})
    blocks = (RowBlock(0, "x", 450, 250), RowBlock(250, "x", 0, 450))
    moved = ParamSpec("a", (700, 300), blocks, {"x": (700, 300)})
    assert weights_digest([moved], {"a": torch.cat([tensor[450:], tensor[:450]])}) == whole
    total = 0
    for start, end in ((0, 7), (7, 111), (111, 300)):
        shape, block = (700, end - start), RowBlock(0, "x", 0, 700)
        part = ParamSpec("a", shape, (block,), {"x": (700, 300)}, start)
        total += digest_sum([part], {"a": tensor[:, start:end]})
    assert f"{total & MASK:016x}" == whole


def test_every_single_bit_counts(specs, params):
    """An update with one flipped bit must never pass as the right one."""
    seen = {weights_digest(specs, params)}
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    bits = params[name].view(torch.int32)
    for bit in range(32):
        mask = (1 << bit) - (1 << 32 if bit == 31 else 0)
        bits[5, 7] ^= mask
        seen.add(weights_digest(specs, params))
        bits[5, 7] ^= mask
    assert len(seen) == 33


def test_every_parameter_counts(specs, params):
    """A parameter left out of the digest could be stale without anybody noticing."""
    seen = {weights_digest(specs, params)}
    for spec in specs:
        kept = params[spec.name].clone()
        params[spec.name].view(-1)[-1 if spec.name != EMBEDDING else 0] += 1
        if spec.name == "output_layer.weight":  # its last rows are padding
            params[spec.name].copy_(kept)[330, -1] += 1
        seen.add(weights_digest(specs, params))
        params[spec.name].copy_(kept)
    assert len(seen) == len(specs) + 1


def test_swaps_and_moves_are_seen(specs, params):
    """Sums commute, so only keys and positions tell apart equal values in another place."""
    original = weights_digest(specs, params)
    gate_up = params["decoder.layers.0.mlp.linear_fc1.weight"]
    gate_up.copy_(gate_up.roll(len(gate_up) // 2, dims=0))  # gate and up exchanged
    assert weights_digest(specs, params) != original
    gate_up.copy_(gate_up.roll(len(gate_up) // 2, dims=0))
    assert weights_digest(specs, params) == original
    a, b = (params[f"decoder.layers.{i}.mlp.linear_fc2.weight"] for i in (0, 1))
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
    assert weights_digest(specs, params) != original
    b.copy_(a)
    a.copy_(kept)
    assert weights_digest(specs, params) == original
    a[[3, 4]] = a[[4, 3]]
    assert weights_digest(specs, params) != original


def test_padding_does_not_count(specs, params):
    """Padded rows are nobody's weights: what stands in them may differ between layouts."""
    original = weights_digest(specs, params)
    params[EMBEDDING][331:] = torch.nan
    assert weights_digest(specs, params) == original
    params[EMBEDDING][330, 0] += 1
    assert weights_digest(specs, params) != original


def test_dtypes_differ():
    """bf16 weights are not the fp32 weights of equal values: they continue differently."""
    specs = [plain("a", "x", (4, 4))]
    values = torch.zeros(4, 4)
    assert weights_digest(specs, {"a": values}) != weights_digest(specs, {"a": values.bfloat16()})
    ones = torch.ones(4, 4, dtype=torch.bfloat16)
    assert weights_digest(specs, {"a": ones}) != weights_digest(specs, {"a": values.bfloat16()})


@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_parts_of_rounded_copies_add_up(size):
    """Optimizers cut flattened parameters anywhere; fp32 copies count as what they round to."""
    config = sharded_config()
    specs = [spec for rank in range(2) for spec in config.param_specs((rank, 2))]
    generator = torch.Generator().manual_seed(size)
    total, expected = 0, 0
    for spec in specs:
        master = torch.randn(spec.shape, generator=generator).flatten()
        master[: len(TIES)] = torch.tensor(TIES)[: len(master)]
        params = {spec.name: master.bfloat16().view(spec.shape)}
        expected += digest_sum([spec], params)
        starts = range(0, len(master), size * len(master) // 60 + 1)
        parts = [Part(spec.name, i, master[i : i + starts.step]) for i in starts]
        digester = Digester([spec], params, parts)
        alone = []
        for i in range(len(parts)):
            digester.start()
            digester.add(i)
            alone.append(digester.finish())
        assert as_digest(alone) == digester.digest() == as_digest([digest_sum([spec], params)])
        total += digester.sum()
    assert as_digest([total]) == as_digest([expected])


def test_a_digester_notices_other_memory(specs, params):
    """Tables hold addresses: a parameter that moved must not be read where it was."""
    params = dict(params)
    digester = Digester(specs, params)
    assert digester.digest() == weights_digest(specs, params)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    params[name][1, 2] += 1
    assert digester.digest() == weights_digest(specs, params)
    params[name] = params[name] + 1
    assert digester.digest() == weights_digest(specs, params)
    for each in params:
        params[each] = params[each].bfloat16()
    assert digester.digest() == weights_digest(specs, params)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_digester_tells_what_is_not_finite(specs, params, value):
    """In padding and in what another rank counts too: such weights are never served."""
    digester = Digester([*specs, replace(specs[0], name="copy", replica=True)], params)
    params["copy"] = params[EMBEDDING].clone()
    expected = weights_digest(specs, params)
    assert digester.digest() == expected
    assert digester.all_finite
    for name, row in (("decoder.layers.1.mlp.linear_fc2.weight", 3), (EMBEDDING, -1), ("copy", 0)):
        kept = params[name][row, -1].clone()
        params[name][row, -1] = value
        assert (digester.digest() == expected) == (row != 3)
        assert not digester.all_finite, name
        params[name][row, -1] = kept
    assert digester.digest() == expected
    assert digester.all_finite


def test_weights_on_several_devices_are_refused():
    """One sum on one device: a part that lies elsewhere would be left out."""
    specs = [plain("a", "x", (2,)), plain("b", "y", (2,))]
    params = {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}
    with pytest.raises(ValueError, match="weights on several devices: cpu, meta"):
        weights_digest(specs, params)


def test_columns_that_lie_apart():
    """A transposed matrix has the digest of its values, not of its memory."""
    values = torch.arange(35.0).view(5, 7)
    specs = [plain("a", "x", (7, 5))]
    transposed = weights_digest(specs, {"a": values.T})
    assert transposed == weights_digest(specs, {"a": values.T.contiguous()})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gpu_gives_the_same_digest(specs, params, dtype):
    """One value for the same weights wherever they lie, whole or as shards."""
    narrow = {name: p.to(dtype) for name, p in params.items()}
    on_gpu = {name: p.cuda() for name, p in narrow.items()}
    assert weights_digest(specs, on_gpu) == weights_digest(specs, narrow)
    config = sharded_config()
    tensors = {n: p.cuda() for n, p in hf_tensors(config.param_specs(), dummy(config, dtype))}
    total = 0
    for rank in range(2):
        own = config.param_specs((rank, 2))
        shard = {s.name: torch.empty(s.shape, dtype=dtype, device="cuda") for s in own}
        load_params(own, shard, parts_of(tensors.__getitem__))
        total += digest_sum(own, shard)
    assert total & MASK == digest_sum(config.param_specs(), dummy(config, dtype))


def dummy(config, dtype):
    """Random weights on the CPU."""
    specs = config.param_specs()
    params = {s.name: torch.empty(s.shape, dtype=dtype) for s in specs}
    load_dummy(specs, params, seed=3)
    return params
