"""One small pass over every operation of kernels/, forward and backward, for `make sanitize`.

    python tests/programs/kernel_pass.py [device [PASS...]]

Named passes run alone, and `list` in place of a device prints the names.

Shapes are small and ragged, so that every kernel meets the edges of its tiles, and what must not
be read is NaN. Exit code 1 if an output is not finite, or a pass has none. A new operation is one
entry of PASSES.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_inputs import attention_inputs
from samebit.kernels.attention_kind import GraphEntries, Heads
from samebit.kernels.bias import linear_with_bias
from samebit.kernels.contract import padded_vocab_size
from samebit.kernels.decode_ring import HostRing, RingRow
from samebit.kernels.kv_write import kv_write
from samebit.kernels.linear import linear, linear_in_segments
from samebit.kernels.logprob import logprob, logsumexp
from samebit.kernels.rms_norm import add_rms_norm, rms_norm
from samebit.kernels.rope import rope, rope_table
from samebit.kernels.sample import allowed_tokens, draw, draw_with_logprobs
from samebit.kernels.swiglu import swiglu, swiglu_linear
from samebit.rollout.device import resolve_device, resolve_dtype

HEADS = ((4, 2, 16, 16), (9, 3, 64, 48), (8, 1, 128, 64))  # Hq, Hkv, Dh, page size
CONTEXT_LENS = (1, 65, 1030, 2100)  # one, two and three KV splits on the GPU
VOCAB_SIZES = (331, 9001)


@dataclass(frozen=True)
class Inputs:
    """Random inputs of the contract's dtype on one device."""

    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """What the contract computes in there."""
        return resolve_dtype(None, self.device)

    def normal(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """N(0, 1), differentiable."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator)
        return values.to(self.device, self.dtype).requires_grad_()

    def attention(self, num_heads: int, num_kv_heads: int, head_dim: int) -> CanonicalAttention:
        """Attention of these heads: Hq, Hkv, Dh."""
        heads = Heads(num_heads, num_kv_heads, head_dim, scale=head_dim**-0.5)
        return CanonicalAttention(heads, self.device)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """int64 in [0, high)."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(high, shape, generator=generator).to(self.device)


def with_gradients(output: torch.Tensor, *inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """The output and the gradients of its sum."""
    yield output
    yield from torch.autograd.grad(output, inputs, torch.ones_like(output))


def linear_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """Aligned and odd shapes, with a bias too: on the GPU cuBLASLt and Triton."""
    for n, k in ((192, 128), (331, 100)):
        weight, bias = make.normal(n, k), make.normal(n, seed=2)
        for m in (1, 17, 300, 700):
            x = make.normal(m, k, seed=1)
            yield from with_gradients(linear(x, weight), x, weight)
            yield from with_gradients(linear_with_bias(x, weight, bias), x, weight, bias)
            yield linear(x.detach(), weight.detach(), torch.float32)
            yield linear_in_segments(x.detach(), weight.detach(), 4)


def streaming_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """The GPU's kernels for few rows in all their forms, whatever the tuning table would choose."""
    if make.device.type != "cuda":
        return
    from samebit.kernels.gpu.skinny import Tile, matmul

    weight = make.normal(256, 576).detach()
    tiles = [Tile(16, 64, 4, 3), Tile(32, 64, 4, 4, prefetch=512), Tile(64, 64, 4, 3, swap=True)]
    tiles += [Tile(32, 64, 4, 4, tma=True), Tile(64, 64, 4, 3, swap=True, tma=True)]
    tiles += [Tile(32, 64, 4, 4, prefetch=512, tail=32), Tile(16, 64, 4, 4, tma=True, tail=16)]
    for tile in tiles:
        for m in (1, 17, 64):
            for n, gated in ((256, False), (128, True)):
                y = torch.full((m, n), float("nan"), dtype=make.dtype, device=make.device)
                matmul(make.normal(m, 576, seed=1).detach(), weight, y, tile, gated=gated)
                yield y


def decode_ends_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """What begins and ends a decode graph, with entries that only fill it up, once round."""
    if make.device.type != "cuda":
        return
    from samebit.kernels.gpu.decode_ends import decode_inputs, decode_outputs

    ring = HostRing(2, 16, make.device)
    slots = torch.tensor([2, 0, 4, 4, 4])
    table = torch.zeros(4, 3, dtype=torch.int32, device=make.device)
    entries = GraphEntries.empty(5, table, page_size=16, max_context=48)
    last = make.integers(9, 5)
    for turn in (0, 1, 0):
        ring.inputs[turn, RingRow.SLOT, :5] = slots
        made = decode_inputs(ring, last, entries)
        decode_outputs(ring, made.slots, made.input_ids + 1, made.temperatures, last)
        yield from (made.input_ids, made.positions, made.kv_slots, made.temperatures, last)
        torch.cuda.synchronize()
        yield ring.token_ids[turn]


def rms_norm_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """Rows of many widths, and heads that lie apart."""
    for width in (64, 100, 576, 5000):
        x, weight = make.normal(13, width), make.normal(width, seed=1)
        yield from with_gradients(rms_norm(x, weight, 1e-6), x, weight)
        residual = make.normal(13, width, seed=2)
        yield from add_rms_norm(x.detach(), residual.detach(), weight.detach(), 1e-6)
    apart = make.normal(13, 3, 5, 64)
    yield rms_norm(apart[:, 1], make.normal(64), 1e-6)


def rope_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """Odd numbers of heads, up to the table's last position."""
    for heads, head_dim in ((9, 64), (17, 128), (3, 20)):
        table = rope_table(head_dim, 1e4, 50, device=make.device)
        positions = torch.cat([make.integers(50, 12), torch.tensor([49], device=make.device)])
        x = make.normal(13, heads, head_dim)
        yield from with_gradients(rope(x, positions, table), x)


def swiglu_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """Rows that fill no block."""
    for width in (100, 1536, 9728):
        gate_up = make.normal(5, 2 * width)
        yield from with_gradients(swiglu(gate_up), gate_up)
    yield swiglu_linear(make.normal(5, 128).detach(), make.normal(192, 128).detach())


def every_way(attention: CanonicalAttention, *inputs: Any) -> Iterator[torch.Tensor]:
    """Attention as it is, and where a Hopper would have its kernel for large batches, by that."""
    yield attention.attend(*inputs)
    if attention.device.type != "cuda":
        return
    from samebit.kernels.gpu import hopper_decode

    with patch.multiple(hopper_decode, _LEAST_ITEMS=0, _MOST_SPLITS=9):
        yield attention.attend(*inputs)


def paged_attention_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """kv_write, then decode over several splits, chunks, and both in one batch."""
    for heads, kv, head_dim, page_size in HEADS:
        attention = make.attention(heads, kv, head_dim)
        counts = [-(-n // page_size) for n in CONTEXT_LENS]
        pages = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
        table = torch.zeros(len(counts), max(counts), dtype=torch.int64)
        shape = (2, len(pages), page_size, kv, head_dim)
        keys, values = torch.full(shape, float("nan"), dtype=make.dtype, device=make.device)
        for i, (own, length) in enumerate(zip(pages.split(counts), CONTEXT_LENS, strict=True)):
            table[i, : len(own)] = own
            place = torch.arange(length)
            kv_slots = (own[place // page_size] * page_size + place % page_size).to(make.device)
            key, value = (make.normal(length, kv, head_dim, seed=s).detach() for s in (1, 2))
            kv_write(key, value, keys, values, kv_slots)
        for chunk in ((1, 1, 1, 1), (1, 17, 70, 129), (1, 1, 17, 1)):
            plan = attention.plan_step(chunk, CONTEXT_LENS, table, page_size)
            q = make.normal(sum(chunk), heads, head_dim).detach()
            yield from every_way(attention, q, keys, values, plan)


def shared_prefix_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """Decode of a group whose prefix ends in a split, behind one and with one; also 5 queries."""
    for heads, kv, head_dim, page_size in HEADS:
        attention = make.attention(heads, kv, head_dim)
        attention.least_shared_bytes = 1
        for shared, queries in ((128, 1), (1152, 1), (1024, 5)):
            full, own = -(-shared // page_size), -(-300 // page_size)
            shape = (full + 6 * own, page_size, kv, head_dim)
            keys, values = (make.normal(*shape, seed=seed).detach() for seed in (0, 1))
            prefix, *rest = torch.arange(len(keys)).split([full, *[own] * 6])
            table = torch.stack([torch.cat([prefix, part]) for part in rest])
            lens = [full * page_size + n for n in (17, 300, 299, 128, 129, 64)]
            plan = attention.plan_step([queries] * 6, lens, table, page_size)
            q = make.normal(6 * queries, heads, head_dim, seed=2).detach()
            yield from every_way(attention, q, keys, values, plan)


def attention_inputs_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """With head norms and without."""
    for heads, kv, head_dim, page_size in HEADS:
        table = rope_table(head_dim, 10000.0, 128, device=make.device)
        qkv = make.normal(35, (heads + 2 * kv) * head_dim).detach()
        norms = (make.normal(head_dim).detach(), make.normal(head_dim, seed=1).detach())
        positions = torch.arange(35, device=make.device)
        shape = (2, 3, page_size, kv, head_dim)
        for used in (norms, None):
            caches = torch.zeros(shape, dtype=make.dtype, device=make.device)
            yield attention_inputs(qkv, used, 1e-6, table, positions, positions + 3, *caches)
            yield caches


def packed_attention_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """The training forward and its backward; also of two parts of one sequence."""
    lens = (1, 65, 300, 1030)
    for heads, kv, head_dim, _ in HEADS:
        q, k, v = (make.normal(sum(lens), n, head_dim, seed=n) for n in (heads, kv, kv))
        attention = make.attention(heads, kv, head_dim)
        plan = attention.plan_packed(lens)
        yield from with_gradients(attention.attend_packed(q, k, v, plan), q, k, v)
        parts = attention.plan_context((30, 100), (30, 300), (0, 0), len(k))
        own = q[:130]
        yield from with_gradients(attention.attend_packed(own, k, v, parts), own, k, v)


def logprob_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """Two chunks of rows over a vocabulary with padding, and its gradients."""
    for vocab_size, rows in zip(VOCAB_SIZES, (7, 530), strict=True):
        hidden, weight = make.normal(rows, 64), make.normal(padded_vocab_size(vocab_size), 64)
        temperature = torch.full((rows,), 0.7, device=make.device)
        ids = make.integers(vocab_size, rows)
        for entropy_grad in (False, True):
            values, entropy = logprob(
                hidden, weight, ids, temperature, vocab_size, entropy_grad=entropy_grad
            )
            yield from with_gradients(values + entropy, hidden, weight)


def sample_pass(make: Inputs) -> Iterator[torch.Tensor]:
    """logsumexp, allowed_tokens and draw on rows with every kind of limit."""
    for vocab_size in VOCAB_SIZES:
        scaled = make.normal(6, vocab_size).detach().float()
        yield logsumexp(scaled)
        seeds = positions = sample_ids = make.integers(1 << 62, 6)
        greedy = torch.arange(6, device=make.device) % 2 == 0
        keys = (seeds, positions, sample_ids, greedy)
        for times in (1, 12):  # few rows and many
            many = [x.repeat(times, *[1] * (x.ndim - 1)) for x in (scaled, *keys)]
            temperature = torch.full((6 * times,), 0.7, device=make.device)
            yield from draw_with_logprobs(many[0], temperature, *many[1:])
        limits = ([0, 1, 5, 0, 40, 0], [1.0, 1.0, 0.9, 0.3, 0.999, 1.0], [0, 0, 0, 0, 0.05, 0.3])
        allowed = allowed_tokens(scaled, *(torch.tensor(x, device=make.device) for x in limits))
        scaled = scaled.masked_fill(~allowed, float("-inf"))
        tokens = draw(scaled, *keys)
        yield scaled.gather(1, tokens[:, None])


PASSES: tuple[Callable[[Inputs], Iterable[torch.Tensor]], ...] = (
    linear_pass,
    streaming_pass,
    decode_ends_pass,
    rms_norm_pass,
    rope_pass,
    swiglu_pass,
    attention_inputs_pass,
    paged_attention_pass,
    shared_prefix_pass,
    packed_attention_pass,
    logprob_pass,
    sample_pass,
)

GPU_PASSES = (streaming_pass, decode_ends_pass)


def main(device: str = "cuda", *names: str) -> int:
    """Run every pass, or those of these names."""
    there = {one_pass.__name__: one_pass for one_pass in PASSES}
    if device == "list":
        print(*there, sep="\n")
        return 0
    if unknown := set(names) - set(there):
        print(f"no pass is named {sorted(unknown)}; there are: {', '.join(there)}", file=sys.stderr)
        return 2
    make, bad = Inputs(resolve_device(device)), []
    for one_pass in [there[name] for name in names or there]:
        outputs = list(one_pass(make))
        finite = all(bool(output.isfinite().all()) for output in outputs)
        left_out = not outputs and one_pass in GPU_PASSES and make.device.type != "cuda"
        said = "" if finite else ", NaN or Inf"
        said += ": not tried, it needs a GPU" if left_out else ""
        bad += [] if finite and (outputs or left_out) else [one_pass.__name__]
        print(f"{one_pass.__name__:22s} {len(outputs):3d} outputs{said}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
