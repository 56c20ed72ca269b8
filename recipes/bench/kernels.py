"""samebit bench kernels: every operation at a model's shapes, against torch and the roofline.

The roofline is what this card reaches in the same run: a copy's rate and a large product's.
All under CUDA graph replay, ours and torch's in turns; products bound by arithmetic for long enough
that the card draws all the power that it may. linear rotates its weights and decode attention its
pages through 256 MB or more, so that no cache holds them, as in an engine that runs a whole model
between two uses; the row operations find their inputs in the cache, as they do in an engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import AttentionKind
from samebit.kernels.deterministic import deterministic
from samebit.kernels.flashinfer import FlashInferAttention
from samebit.kernels.linear import linear
from samebit.kernels.logprob import logsumexp
from samebit.kernels.memory import Arena
from samebit.kernels.profile import numerics_profile
from samebit.kernels.rms_norm import add_rms_norm, rms_norm
from samebit.kernels.rope import rope
from samebit.kernels.sample import draw, draw_with_logprobs
from samebit.kernels.swiglu import swiglu
from samebit.recipes.bench.config import BenchKernelsRun
from samebit.recipes.bench.output import REPORT_FILE, format_table, model_fields
from samebit.recipes.bench.timing import Spread, card_rates, graph_us, graphs_us, num_copies
from samebit.recipes.config import ConfigError
from samebit.recipes.run.folder import require_own_report
from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import DeviceError, resolve_device
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import DenseModel
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.kv_cache import KVCache

Row = dict[str, Any]
"""One measurement: a line of a table and of bench.json."""

DECODE = (
    (1, 512), (1, 8192), (1, 32768), (8, 512), (64, 512), (64, 2048), (256, 1024), (256, 4096),
)  # fmt: skip
SHARED = (
    (64, 8, 512, 256), (64, 8, 512, 2048), (16, 16, 8192, 256), (8, 8, 512, 256), (5, 8, 512, 256),
    (1, 4, 8192, 256), (1, 3, 8192, 256), (1, 9, 512, 256), (1, 16, 512, 2048), (1, 32, 512, 256),
)  # fmt: skip
PREFILL = ((8, 512), (8, 1024), (1, 8192))
TRAINING = ((8, 1024), (1, 8192))
FEW_ROWS, MOST_LOGIT_ROWS = (1, 64, 512, 4096), 512
HEAD = "lm_head"
_PAGE = 64
_CUDA = torch.device("cuda")
_BF16 = torch.bfloat16
_MAX_PLANS = 128


def _randn(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=_CUDA)


def _against_torch(us: Spread, torch_us: Spread) -> Row:
    return {
        "us": us.median,
        "torch_us": torch_us.median,
        "ratio": us.median / torch_us.median,
        "spread": asdict(us),
        "torch_spread": asdict(torch_us),
    }


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight, torch.float32)


def _torch_logits(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def bench_linear(config: ModelConfig, run: BenchKernelsRun) -> list[Row]:
    """Our product and torch's of the same operands.

    `layer` rows are sums of a layer's four, `layer in turn` those four one behind the other.
    """
    rows: list[Row] = []
    rates = card_rates()
    shapes = {name: (product.n, product.k) for name, product in config.layer_products.items()}
    shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for shape, (n, k) in shapes.items():
        weights = [_randn(n, k) for _ in range(num_copies(2 * n * k))]
        inputs = _randn(max(run.measured_rows), k)
        is_head = shape == HEAD
        ours, theirs = (_logits, _torch_logits) if is_head else (linear, F.linear)
        for m in run.measured_rows:
            cost = (2 * m * n * k, 2 * (n + m) * k + (4 if is_head else 2) * m * n)
            flops, num_bytes = cost
            ideal, sustained = rates.ideal_us(*cost), rates.compute_bound(*cost)
            ways = [[partial(f, inputs[:m], w) for w in weights] for f in (ours, theirs)]
            us, torch_us = graphs_us(ways, ideal, run.replays, sustained)
            row = {"shape": shape, "m": m, **_against_torch(us, torch_us)}
            row |= {"tflop_s": flops / us.median / 1e6, "gb_s": num_bytes / us.median / 1e3}
            rows.append(row | {"roofline": ideal / us.median})
        del weights
        torch.cuda.empty_cache()
    return rows + layer_sums(rows) + layers_in_turn(config, run)


def layer_sums(rows: list[Row]) -> list[Row]:
    """By number of rows, the time of a layer's four products."""
    sums = []
    for m in dict.fromkeys(row["m"] for row in rows):
        parts = [row for row in rows if row["m"] == m and row["shape"] != HEAD]
        us, torch_us = (sum(row[key] for row in parts) for key in ("us", "torch_us"))
        ideal = sum(row["us"] * row["roofline"] for row in parts)
        sums.append(
            {"shape": "layer", "m": m, "us": us, "torch_us": torch_us, "ratio": us / torch_us,
             "roofline": ideal / us}
        )  # fmt: skip
    return sums


def layers_in_turn(config: ModelConfig, run: BenchKernelsRun) -> list[Row]:
    """By number of rows, a layer's four products in the order in which a model runs them."""
    shapes = [(product.n, product.k) for product in config.layer_products.values()]
    num_bytes = sum(2 * n * k for n, k in shapes)
    layers = [[_randn(*shape) for shape in shapes] for _ in range(max(2, num_copies(num_bytes)))]
    inputs = [_randn(max(run.measured_rows), k) for _, k in shapes]

    def products(multiply: Callable, weights: list[Tensor], m: int) -> None:
        for x, weight in zip(inputs, weights, strict=True):
            multiply(x[:m], weight)

    rates, rows = card_rates(), list[Row]()
    for m in run.measured_rows:
        costs = [(2 * m * n * k, 2 * (n * k + m * (n + k))) for n, k in shapes]
        ideal = sum(rates.ideal_us(*cost) for cost in costs)
        sustained = rates.compute_bound(*map(sum, zip(*costs, strict=True)))
        ways = [[partial(products, f, layer, m) for layer in layers] for f in (linear, F.linear)]
        us, torch_us = graphs_us(ways, ideal, run.replays, sustained)
        row = {"shape": "layer in turn", "m": m, **_against_torch(us, torch_us)}
        rows.append(row | {"roofline": ideal / us.median})
    return rows


def make_cache(config: DenseModel, num_pages: int) -> tuple[Tensor, Tensor]:
    """Key and value cache of one layer with random contents, laid out as the engine's."""
    layout = replace(config.kv_layout, num_layers=1)
    cache = KVCache([layout], num_pages, _PAGE, _BF16, Arena(_CUDA, releasable=False))
    return cache.keys[0].normal_(), cache.values[0].normal_()


def attention_kinds(config: DenseModel) -> list[AttentionKind]:
    """Our attention, and FlashInfer's where it is installed as it is pinned."""
    heads = config.attention_heads()
    kinds: list[AttentionKind] = [CanonicalAttention(heads, _CUDA)]
    try:
        FlashInferAttention.require_usable(_CUDA.type)
    except ValueError as reason:
        print(f"FlashInfer's attention is not measured: {reason}")
        return kinds
    return [*kinds, FlashInferAttention(heads, _CUDA)]


def _beside(others: Sequence[Spread]) -> Row:
    return {"flashinfer_us": others[0].median} if others else {}


def bench_attention(config: DenseModel, run: BenchKernelsRun) -> list[Row]:
    """Decode: one new token a sequence; bytes are those of its keys and values."""
    copy_rate = card_rates().memory_bytes_s
    kinds = attention_kinds(config)
    rows: list[Row] = []
    for batch, context in DECODE:
        pages = batch * -(-context // _PAGE)
        num_bytes = batch * context * config.kv_layout.bytes_per_token(torch.bfloat16)
        num_bytes //= config.num_layers
        count = min(num_copies(num_bytes), _MAX_PLANS)
        keys, values = make_cache(config, count * pages)
        tables = torch.randperm(count * pages).view(count, batch, -1)
        query = _randn(batch, config.num_heads, config.head_dim)
        lens = ([1] * batch, [context] * batch)
        ways: list[list[Callable[[], Any]]] = [
            [partial(kind.attend, query, keys, values, kind.plan_step(*lens, t, _PAGE))
             for t in tables]
            for kind in kinds
        ]  # fmt: skip
        us, *others = graphs_us(ways, num_bytes / copy_rate * 1e6, run.replays)
        rate = num_bytes / us.median * 1e6
        rows.append(
            {"batch": batch, "context": context, "us": us.median, **_beside(others),
             "gb_s": rate / 1e9, "copy_gb_s": copy_rate / 1e9, "of_copy": rate / copy_rate,
             "spread": asdict(us)}
        )  # fmt: skip
        del keys, values, ways
        torch.cuda.empty_cache()
    return rows


def bench_shared_prefixes(config: DenseModel, run: BenchKernelsRun) -> list[Row]:
    """Decode of groups whose samples share a prompt, read by each of them and read once; and which
    of both is done."""
    copy_rate = card_rates().memory_bytes_s
    kinds = [CanonicalAttention(config.attention_heads(), _CUDA) for _ in range(3)]
    kinds[0].least_shared_bytes, kinds[1].least_shared_bytes = 0, None
    token_bytes = config.kv_layout.bytes_per_token(torch.bfloat16) // config.num_layers
    rows: list[Row] = []
    for groups, size, prompt, drawn in SHARED:
        shared, own = (-(-n // _PAGE) for n in (prompt, drawn))
        batch, pages = groups * size, groups * shared + groups * size * own
        num_bytes = (groups * prompt + batch * drawn) * token_bytes
        count = min(num_copies(num_bytes), _MAX_PLANS)
        keys, values = make_cache(config, count * pages)
        query = _randn(batch, config.num_heads, config.head_dim)
        ways: list[list[Callable[[], Any]]] = [[], [], []]
        for order in torch.randperm(count * pages).view(count, pages):
            prefixes = order[: groups * shared].view(groups, shared).repeat_interleave(size, 0)
            table = torch.cat([prefixes, order[groups * shared :].view(batch, own)], 1)
            lens = [1] * batch, [shared * _PAGE + drawn] * batch
            for way, attention in zip(ways, kinds, strict=True):
                plan = attention.plan_step(*lens, table, _PAGE)
                way.append(partial(attention.attend, query, keys, values, plan))
        ideal = num_bytes / copy_rate * 1e6
        us, alone_us, chosen_us = graphs_us(ways, ideal, run.replays)
        rows.append(
            {"groups": groups, "size": size, "prompt": prompt, "drawn": drawn, "us": us.median,
             "alone_us": alone_us.median, "chosen_us": chosen_us.median,
             "of_copy": ideal / us.median, "gain": alone_us.median / us.median,
             "spread": asdict(us)}
        )  # fmt: skip
        del keys, values, ways
        torch.cuda.empty_cache()
    return rows


def _flash(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)


def bench_prefill(config: DenseModel, run: BenchKernelsRun) -> list[Row]:
    """Packed causal attention of equal lengths, against torch's flash attention."""
    rows: list[Row] = []
    Hq, Hkv, Dh = config.num_heads, config.num_kv_heads, config.head_dim
    kinds = attention_kinds(config)
    for batch, length in PREFILL:
        q, k, v = (_randn(batch * length, heads, Dh) for heads in (Hq, Hkv, Hkv))
        ours: list[list[Callable[[], Any]]] = [
            [partial(kind.attend_packed, q, k, v, kind.plan_packed([length] * batch))]
            for kind in kinds
        ]
        flops = batch * config.attention_flops(length) // config.num_layers
        expected = card_rates().ideal_us(flops, 0)
        # Repeated heads: its products take the same time, and any build of torch has that kernel.
        padded = [
            x.view(batch, length, -1, Dh).repeat_interleave(Hq // x.shape[1], 2).transpose(1, 2)
            for x in (q, k, v)
        ]
        ways: list[list[Callable[[], Any]]] = [[partial(_flash, *padded)], *ours]
        torch_us, us, *others = graphs_us(ways, expected, run.replays)
        row = {"batch": batch, "length": length, **_against_torch(us, torch_us), **_beside(others)}
        row["tflop_s"], row["torch_tflop_s"] = (flops / x.median / 1e6 for x in (us, torch_us))
        rows.append(row)
    return rows


def _gradients(attend: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Any:
    with torch.enable_grad():
        return torch.autograd.grad(attend(*inputs), inputs, grad)


def _torch_gradients(inputs: Sequence[Tensor], grad: Tensor) -> Any:
    with deterministic():
        return _gradients(partial(_flash, enable_gqa=True), inputs, grad)


def bench_training(config: DenseModel, run: BenchKernelsRun) -> list[Row]:
    """Packed causal attention with its gradients, against torch's deterministic flash attention."""
    rows: list[Row] = []
    Hq, Hkv, Dh = config.num_heads, config.num_kv_heads, config.head_dim
    attention = CanonicalAttention(config.attention_heads(), _CUDA)
    for batch, length in TRAINING:
        plan = attention.plan_packed([length] * batch)
        inputs = [_randn(batch * length, n, Dh).requires_grad_() for n in (Hq, Hkv, Hkv)]
        padded = [x.detach().view(batch, length, -1, Dh).transpose(1, 2) for x in inputs]
        for x in padded:
            x.requires_grad_()
        grad = _randn(batch * length, Hq, Dh)
        ours = partial(_gradients, partial(attention.attend_packed, plan=plan), inputs, grad)
        padded_grad = grad.view(batch, length, Hq, Dh).transpose(1, 2)
        theirs = partial(_torch_gradients, padded, padded_grad)
        # Two products of the forward, five of the backward.
        flops = 3.5 * batch * config.attention_flops(length) // config.num_layers
        expected = card_rates().ideal_us(flops, 0)
        us, torch_us = graphs_us([[ours], [theirs]], expected, run.replays)
        row = {"batch": batch, "length": length, **_against_torch(us, torch_us)}
        row["tflop_s"], row["torch_tflop_s"] = (flops / x.median / 1e6 for x in (us, torch_us))
        rows.append(row)
    return rows


def row_operations(config: DenseModel, m: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """By name: the operation on m rows, and the bytes that it reads and writes."""
    D, ffn, eps = config.hidden_size, config.ffn_size, config.norm_eps
    width = config.num_heads * config.head_dim
    x, residual, weight = _randn(m, D), _randn(m, D), _randn(D)
    gate_up, q = _randn(m, 2 * ffn), _randn(m, config.num_heads, config.head_dim)
    table = config.rope_table(m, _CUDA)
    places = torch.arange(m, device=_CUDA)
    found: dict[str, tuple[Callable[[], Any], int]] = {
        "rms_norm": (partial(rms_norm, x, weight, eps), 4 * m * D),
        "add_rms_norm": (partial(add_rms_norm, x, residual, weight, eps), 8 * m * D),
        "swiglu": (partial(swiglu, gate_up), 6 * m * ffn),
        "rope (queries)": (partial(rope, q, places, table), 4 * m * width),
    }
    if m <= MOST_LOGIT_ROWS:
        scores = _randn(m, config.vocab_size, dtype=torch.float32)
        seeds, greedy = torch.zeros_like(places), torch.zeros(m, dtype=torch.bool, device=_CUDA)
        num_bytes = 4 * scores.numel()
        found["logsumexp"] = (partial(logsumexp, scores), num_bytes)
        keys = seeds, places, places, greedy
        found["draw"] = (partial(draw, scores, *keys), num_bytes)
        drawing = partial(draw_with_logprobs, scores, torch.ones_like(scores[:, 0]), *keys)
        found["draw_with_logprobs"] = (drawing, num_bytes)
    return found


def bench_rows(config: DenseModel, run: BenchKernelsRun) -> list[Row]:
    """Norms, activation, rotation and the two passes over logits."""
    rows: list[Row] = []
    for m in FEW_ROWS:
        for name, (action, num_bytes) in row_operations(config, m).items():
            us = graph_us([action], card_rates().ideal_us(0, num_bytes), run.replays)
            rate = num_bytes / us.median / 1e3
            rows.append(
                {"operation": name, "m": m, "us": us.median, "gb_s": rate, "spread": asdict(us)}
            )
    return rows


BENCHES = {
    "linear": bench_linear,
    "attention": bench_attention,
    "shared": bench_shared_prefixes,
    "prefill": bench_prefill,
    "training": bench_training,
    "rows": bench_rows,
}
_FORMATS = {
    "us": "{:,.2f}", "torch_us": "{:,.2f}", "ratio": "{:.2f}", "tflop_s": "{:,.1f}",
    "torch_tflop_s": "{:,.1f}", "gb_s": "{:,.0f}", "copy_gb_s": "{:,.0f}", "roofline": "{:.2f}",
    "flashinfer_us": "{:,.2f}", "of_copy": "{:.2f}", "alone_us": "{:,.2f}",
    "chosen_us": "{:,.2f}", "gain": "{:.2f}",
}  # fmt: skip


def table_of(rows: list[Row]) -> str:
    """Measurements as an aligned table, without their spreads."""
    keys = [key for key in rows[0] if not key.endswith("spread")]
    lines = [
        [_FORMATS.get(key, "{}").format(row[key]) if key in row else "" for key in keys]
        for row in rows
    ]
    return format_table([keys, *lines])


def main(run: BenchKernelsRun) -> int:
    """The command `samebit bench kernels`."""
    require_own_report(run.run_dir / REPORT_FILE)
    device = resolve_device(run.device)
    if device.type != "cuda":
        raise DeviceError("bench kernels needs a CUDA device; `bench engine` also takes device=cpu")
    if run.tune:
        from samebit.recipes.bench import tune  # needs Triton

        return tune.main(run)
    torch.manual_seed(run.seed)
    config = load_model_config(run.model, run.model_family)
    if not isinstance(config, DenseModel):
        raise ConfigError(f"model={run.model}: bench kernels measures dense models alone")
    tables: dict[str, list[Row]] = {}
    report = {
        **model_fields(run.model),
        "numerics": asdict(numerics_profile(_CUDA)),
        "card": asdict(card_rates()),
        "tables": tables,
    }
    for name in run.tables:
        tables[name] = BENCHES[name](config, run)
        write_result(run.run_dir / REPORT_FILE, device, report)
        print(f"\n{name}\n{table_of(tables[name])}", flush=True)
    print(f"\n{card_rates().words}")
    print(f"{run.run_dir / REPORT_FILE} holds the report.")
    return 0
