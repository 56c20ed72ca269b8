"""Fused and tuned kernels on the card: the bits of the single operations they stand for."""

import pytest
import torch

from samebit.kernels.attention_inputs import attention_inputs, attention_inputs_ref
from samebit.kernels.logprob import logprob_of
from samebit.kernels.rms_norm import add_rms_norm, rms_norm
from samebit.kernels.rope import rope_table
from samebit.kernels.sample import draw, draw_with_logprobs
from samebit.kernels.swiglu import swiglu

pytestmark = pytest.mark.gpu

SKINNY_ROWS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128)
SHAPES = ((6144, 4096), (4096, 4096), (4096, 12288), (1024, 3072), (960, 576), (576, 1536))


def bf16(*shape, seed=0, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, device="cuda", generator=generator) * scale).to(torch.bfloat16)


def skinny_tiles():
    from samebit.kernels.gpu.skinny import Tile

    return (
        Tile(16, 64, 4, 4),
        Tile(32, 64, 4, 4, prefetch=512),
        Tile(32, 64, 4, 4, tma=True, prefetch=512),
        Tile(32, 128, 4, 4, prefetch=256, tail=16),
        Tile(32, 128, 4, 4, tma=True, tail=16),
        Tile(64, 64, 8, 4, tail=32),
        Tile(64, 64, 4, 3, swap=True),
        Tile(64, 64, 4, 3, swap=True, tma=True, prefetch=512),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_skinny_products_are_equal(shape, out_dtype):
    """Whatever the tile, the operand order and the way weights are loaded."""
    from samebit.kernels.gpu import skinny
    from samebit.kernels.gpu.linear import linear_triton

    weight, x = bf16(*shape, scale=0.03), bf16(128, shape[1], seed=1)
    truth = torch.empty(128, shape[0], dtype=out_dtype, device="cuda")
    linear_triton(x, weight, truth)
    for tile in skinny_tiles():
        for m in SKINNY_ROWS:
            if not tile.divides(*shape):
                continue
            y = torch.full_like(truth[:m], float("nan"))
            skinny.matmul(x[:m], weight, y, tile)
            assert torch.equal(y, truth[:m]), (m, tile)


@pytest.mark.parametrize("shape", [(24576, 4096), (3072, 576), (6144, 1024)], ids=str)
def test_gated_products_are_equal(shape):
    from samebit.kernels.gpu import skinny
    from samebit.kernels.gpu.linear import linear_triton

    weight, x = bf16(*shape, scale=0.03), bf16(128, shape[1], seed=1)
    wide = torch.empty(128, shape[0], dtype=torch.bfloat16, device="cuda")
    linear_triton(x, weight, wide)
    truth = swiglu(wide)
    for tile in skinny_tiles():
        for m in SKINNY_ROWS:
            if not tile.divides(shape[0] // 2, shape[1]) or (tile.swap and m > 64):
                continue
            y = torch.full_like(truth[:m], float("nan"))
            skinny.matmul(x[:m], weight, y, tile, gated=True)
            assert torch.equal(y, truth[:m]), (m, tile)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_answer_of_cublaslt_is_equal(shape):
    from samebit.kernels.gpu import cublaslt
    from samebit.kernels.gpu.linear import linear_triton

    weight, x = bf16(*shape, scale=0.03), bf16(2048, shape[1], seed=1)
    for out_dtype in (torch.bfloat16, torch.float32):
        truth = torch.empty(2048, shape[0], dtype=out_dtype, device="cuda")
        linear_triton(x, weight, truth)
        for m in (1, 16, 64, 128, 256, 384, 512, 1024, 2048):
            for answer in cublaslt.variants(x[:m], weight, truth[:m]):
                y = torch.full_like(truth[:m], float("nan"))
                cublaslt.matmul(x[:m], weight, y, answer)
                assert torch.equal(y, truth[:m]), (m, out_dtype, answer)


@pytest.mark.parametrize("width", [64, 128, 576, 1024, 2560, 4096, 5120, 100])
def test_add_rms_norm(width):
    x, residual = bf16(130, width), bf16(130, width, seed=1, scale=4.0)
    weight = 1 + bf16(width, seed=2, scale=0.1)
    for m in (1, 2, 9, 130):
        y, total = add_rms_norm(x[:m], residual[:m], weight, 1e-6)
        assert torch.equal(total, residual[:m] + x[:m])
        assert torch.equal(y, rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize(
    ("kv", "group", "dim", "normed"),
    [(8, 4, 128, True), (8, 2, 128, True), (3, 3, 64, False), (2, 1, 64, True), (4, 8, 128, True)],
)
def test_attention_inputs(kv, group, dim, normed):
    """Queries, keys and values of the single operations; without a kv_slot nothing is stored."""
    num_tokens, page = 67, 16
    table = rope_table(dim, 1e6, 4096, device="cuda")
    positions = torch.randint(0, 4096, (num_tokens,), device="cuda")
    qkv = bf16(num_tokens, kv * (group + 2) * dim)
    norms = tuple(1 + bf16(dim, seed=s, scale=0.1) for s in (3, 4)) if normed else None
    kv_slots = torch.randperm(8 * page, device="cuda")[:num_tokens]
    caches = [torch.zeros(8, page, kv, dim, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    arguments = (norms, 1e-6, table, positions, kv_slots)
    q = attention_inputs(qkv, *arguments, *caches[:2])
    assert torch.equal(q, attention_inputs_ref(qkv, *arguments, *caches[2:]))
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    wide = torch.zeros(2, 9, page, kv, dim, dtype=torch.bfloat16, device="cuda")
    nowhere = torch.full_like(kv_slots, -1)
    attention_inputs(-qkv, norms, 1e-6, table, positions, nowhere, *wide[:, 1:])
    assert not wide.any()  # nor before the caches


@pytest.mark.parametrize("vocab", [331, 49152, 151936])
@pytest.mark.parametrize("rows", [1, 3, 37, 130])
def test_draw_with_logprobs(vocab, rows):
    """The draw and the log-prob of the scaled logits, one by one."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(rows, vocab, device="cuda", generator=generator) * 3
    temperature = torch.rand(rows, device="cuda", generator=generator) + 0.3
    seeds = torch.full((rows,), 12345, device="cuda")
    positions = torch.arange(rows, device="cuda") + 7
    ids = torch.arange(rows, device="cuda") * 3 - 2**61
    greedy = torch.arange(rows, device="cuda") % 3 == 1
    tokens, logprobs = draw_with_logprobs(logits, temperature, seeds, positions, ids, greedy)
    scaled = logits / temperature[:, None]
    assert torch.equal(tokens, draw(scaled, seeds, positions, ids, greedy))
    assert torch.equal(logprobs, logprob_of(scaled, tokens))
    again = draw_with_logprobs(
        *(x[rows // 2 :] for x in (logits, temperature, seeds, positions, ids, greedy))
    )
    assert torch.equal(again[0], tokens[rows // 2 :])
    assert torch.equal(again[1], logprobs[rows // 2 :])
