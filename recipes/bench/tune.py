"""samebit bench kernels --tune: measure every way to compute a product, keep the fastest.

Times are medians under CUDA graph replay with weights rotated so that L2 never holds them. A
product of few rows is timed with a norm before it, as in a model, where one kernel's start hides
behind the work of another, and alone; one of many rows for longer, until the card draws all the
power that it may, as in a prefill: the fastest there need not be the fastest on a cool card.
Kernels are compiled by many processes first. The result is a table (kernels/gpu/tuning.py).
"""

import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import TritonError

from samebit.kernels.gpu import cublaslt, skinny
from samebit.kernels.gpu.cublaslt import Answer
from samebit.kernels.gpu.rms_norm import add_rms_norm
from samebit.kernels.gpu.skinny import Tile
from samebit.kernels.gpu.swiglu import swiglu
from samebit.kernels.gpu.tuning import (
    Choice,
    Key,
    architecture,
    row_bucket,
    table_name,
    to_json,
    user_tables,
)
from samebit.recipes.bench.config import BenchKernelsRun
from samebit.recipes.bench.timing import Action, card_rates, graph_us, graphs_us, num_copies
from samebit.recipes.run.provenance import write_result
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.registry import load_model_config
from samebit.weight_sync.disk import write_atomically

SKINNY_ROWS = (16, 32, 64, 128)
LARGE_ROWS = (160, 192, 224, 256, 320, 384, 448, 512, 1024, 2048, 4096, 8192)
PREFETCH, LONG_PREFETCH, LONG_K = 256, 512, 8192
_SHARED_BYTES = 220 << 10
_FINALISTS, _REPLAYS = 6, 20
_JOBS = 4  # kernels that a process is given to compile at a time
_WORTH = 0.99  # of the default's time: below, an entry is worth its place

type Broken = dict[tuple[int, bool, bool, Tile], str]
"""Why a kernel cannot be built, by its rows, gated, fp32 and tile."""


def tiles(rows: int, n: int, k: int, gated: bool) -> Iterator[Tile]:
    """Every tile to try that fits the product and an SM's shared memory."""
    plain = itertools.product((16, 32, 64), (64, 128, 256), (4,), (3, 4, 5, 6, 8), (False,))
    swapped = itertools.product((64, 128), (64, 128), (4, 8), (3, 4, 5), (True,))
    block_m = skinny.block_rows(rows)
    ahead = (PREFETCH, LONG_PREFETCH) if k >= LONG_K else (PREFETCH if k >= PREFETCH else 0,)
    two = itertools.product((32, 64), (64, 128), (4, 8), (3, 4, 5, 6, 8), (16, 32))
    tailed = (Tile(n, k, w, s, tail=t) for n, k, w, s, t in two if t < n)
    for tile in (*itertools.starmap(Tile, itertools.chain(plain, swapped)), *tailed):
        width = tile.columns * (2 if gated else 1)
        shared = 2 * tile.block_k * (width + block_m) * tile.stages
        too_tall = not tile.swap and block_m > (64 if tile.warps == 4 else 128)
        if tile.swap and width * block_m > 128 * 128 * tile.warps // 4:
            continue  # accumulators would not fit the registers
        if not tile.divides(n, k) or too_tall or not 48 << 10 <= shared <= _SHARED_BYTES:
            continue
        if tile.swap and tile.warps == 8 and tile.block_n == 64:
            continue
        for tma, prefetch in itertools.product((False, True), ahead):
            yield replace(tile, tma=tma, prefetch=prefetch)


def _compile(job: tuple[int, int, int, bool, bool, Tile]) -> str | None:
    """Compile one kernel into the shared cache; the error if it does not."""
    rows, n, k, gated, fp32, tile = job
    dtype = torch.float32 if fp32 else torch.bfloat16
    weight = torch.zeros(n * (2 if gated else 1), k, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(rows, k, dtype=torch.bfloat16, device="cuda")
    y = torch.empty(rows, n, dtype=dtype, device="cuda")
    try:
        skinny.matmul(x, weight, y, tile, gated=gated)
        torch.cuda.synchronize()
    except (RuntimeError, TritonError) as error:  # what cannot be built is no candidate
        return f"{tile}: {type(error).__name__}: {str(error)[:200]}"
    return None


def compile_all(keys: Iterable[Key]) -> Broken:
    """Build every kernel that tuning will want; errors by kernel."""
    jobs: dict[tuple[int, bool, bool, Tile], tuple[int, int, int, bool, bool, Tile]] = {}
    for key in keys:
        if key.rows > skinny.MAX_ROWS:
            continue
        for tile in tiles(key.rows, key.n, key.k, key.gated):
            n = 8 * tile.columns
            jobs[key.rows, key.gated, key.fp32, tile] = (
                key.rows, n, 2048, key.gated, key.fp32, tile
            )  # fmt: skip
    workers = max(1, min((os.cpu_count() or 2) - 2, len(jobs) // _JOBS))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        errors = pool.map(_compile, jobs.values(), chunksize=_JOBS)
        return {what: e for what, e in zip(jobs, errors, strict=True) if e is not None}


def model_keys(config: ModelConfig, row_counts: Sequence[int]) -> list[Key]:
    """Products of a model at these row counts."""
    products = config.layer_products
    wide, head = products["gate_up"], (config.vocab_size, config.hidden_size)
    keys = []
    for rows in row_counts:
        keys += [Key(p.n, p.k, rows, fp32=p.biased) for p in products.values()]
        if rows <= skinny.MAX_ROWS:
            keys.append(Key(wide.n // 2, wide.k, rows, gated=True))
        if rows <= 512:
            keys.append(Key(*head, rows, fp32=True))
    return keys


class _Product:
    """One product with its operands, ready to be timed in every way."""

    def __init__(self, key: Key) -> None:
        self.key, self.few = key, key.rows <= skinny.MAX_ROWS
        wide = key.n * (2 if key.gated else 1)
        self.copies = min(64, num_copies(wide * key.k * 2))
        self.ideal_us = card_rates().ideal_us(2 * key.rows * wide * key.k, 2 * wide * key.k)
        self.weights = [
            torch.randn(wide, key.k, device="cuda").mul_(0.02).to(torch.bfloat16)
            for _ in range(self.copies)
        ]
        self.raw = torch.randn(key.rows, key.k, device="cuda").to(torch.bfloat16)
        self.x, self.zero, self.one = self.raw, torch.zeros_like(self.raw), self.raw[0] * 0 + 1
        dtype = torch.float32 if key.fp32 else torch.bfloat16
        self.y, self.wide = (
            torch.empty(key.rows, n, dtype=dtype, device="cuda") for n in (key.n, wide)
        )

    def by_cublaslt(self, answer: Answer, i: int) -> None:
        """This answer of cuBLASLt's."""
        cublaslt.matmul(self.x, self.weights[i], self.wide, answer)
        if self.key.gated:
            swiglu(self.wide)

    def by_tile(self, tile: Tile, i: int) -> None:
        """The streaming kernel."""
        skinny.matmul(self.x, self.weights[i], self.y, tile, gated=self.key.gated)

    def by_torch(self, i: int) -> None:
        """What torch would do."""
        if self.key.fp32:
            torch.mm(self.x, self.weights[i].t(), out_dtype=torch.float32)
        else:
            torch.mm(self.x, self.weights[i].t(), out=self.wide)
            if self.key.gated:
                swiglu(self.wide)

    def steps(self, action: Callable[[int], None], alone: bool = False) -> list[Action]:
        """action(copy) for every copy, where the rows are few after a norm unless alone."""

        def chain(i: int) -> None:
            self.x, _ = add_rms_norm(self.raw, self.zero, self.one, 1e-6)
            action(i)

        step = chain if self.few and not alone else action
        return [partial(step, i) for i in range(self.copies)]


def candidates(product: _Product, broken: Broken) -> dict[Choice, Callable[[int], None]]:
    """Every way to compute a product; cuBLASLt's first answer, which needs no entry, first."""
    key, answers = product.key, [cublaslt.FIRST]
    if not key.gated:
        answers = cublaslt.variants(product.x, product.weights[0], product.y)
    found: dict[Choice, Callable[[int], None]] = {
        Choice(cublaslt=answer): partial(product.by_cublaslt, answer) for answer in answers
    }
    if product.few:
        for tile in tiles(key.rows, key.n, key.k, key.gated):
            if (key.rows, key.gated, key.fp32, tile) not in broken:
                found[Choice(tile)] = partial(product.by_tile, tile)
    return found


def tune_product(key: Key, broken: Broken) -> tuple[Choice, dict[str, float]]:
    """The fastest choice, and microseconds of it, of cuBLASLt's first answer and of torch.

    All are timed once; the fastest few again, in turns, because times of one choice lie
    further apart than what some choices gain. Those of few rows are then timed alone as well and
    the mean counts; of many rows the heuristic's own answers are timed again too, since the power
    that is drawn by then changes the order.
    """
    product = _Product(key)
    ways = candidates(product, broken)
    first = {
        choice: graph_us(product.steps(action), product.ideal_us, 5).median
        for choice, action in ways.items()
    }
    finalists = [Choice(), *sorted(first, key=first.__getitem__)[:_FINALISTS]]
    if not product.few:
        finalists += [c for c in ways if c.cublaslt == Answer(c.cublaslt.number)]
    finalists = list(dict.fromkeys(finalists))
    actions = [*(ways[choice] for choice in finalists), product.by_torch]
    spreads = [
        graphs_us(
            [product.steps(action, alone) for action in actions],
            product.ideal_us,
            _REPLAYS,
            sustained=not product.few,
        )
        for alone in ((False, True) if product.few else (True,))
    ]
    *times, torch_us = (
        statistics.mean(spread.median for spread in kinds) for kinds in zip(*spreads, strict=True)
    )
    us = dict(zip(finalists, times, strict=True))
    best = min(us, key=us.__getitem__)
    if us[best] >= _WORTH * us[Choice()]:
        best = Choice()
    return best, {"torch": torch_us, "cublaslt": us[Choice()], "best": us[best]}


def tune(keys: Sequence[Key]) -> tuple[dict[Key, Choice], list[dict[str, Any]]]:
    """Choices for all keys, and the measured rows."""
    start = time.perf_counter()
    broken = compile_all(keys)
    print(f"compiled in {time.perf_counter() - start:.0f} s, {len(broken)} tiles cannot be built")
    for what, error in itertools.islice(broken.items(), 5):
        print("  ", what[:3], error)
    choices, rows = {}, []
    for key in keys:
        best, us = tune_product(key, broken)
        torch.cuda.empty_cache()
        rows.append({**vars(key), **{k: round(v, 2) for k, v in us.items()}})
        if best != Choice():
            choices[key] = best
        label = f"{key.n}x{key.k}{' gated' if key.gated else ''} M={key.rows}"
        print(
            f"{label:28s} torch {us['torch']:8.1f} lt {us['cublaslt']:8.1f} best "
            f"{us['best']:8.1f} us ({us['best'] / us['torch']:.3f})  {best.tile or best.cublaslt}",
            flush=True,
        )
    return choices, rows


def write_table(choices: dict[Key, Choice], rows: list[dict[str, Any]], path: Path) -> None:
    """A table file: what this machine had measured before with these products' choices in place.

    Its head is this run's; `earlier` holds those of the runs before, and a measured row has its
    own run's date.
    """
    old = user_tables() / table_name(torch.cuda.get_device_name())
    known = json.loads(old.read_text()) if old.exists() else {"linear": [], "measured_us": []}

    def identity(row: dict[str, Any]) -> tuple:
        return tuple(row[f.name] for f in fields(Key))

    anew = {identity(row) for row in rows}
    linear, measured = (
        [row for row in known[name] if identity(row) not in anew]
        for name in ("linear", "measured_us")
    )
    device = torch.device("cuda")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    before = {k: v for k, v in known.items() if k not in ("linear", "measured_us", "earlier")}
    report = {
        "earlier": [*([before] if before else []), *known.get("earlier", [])],
        "architecture": architecture(device),
        "linear": linear + to_json(choices),
        "measured_us": measured + [row | {"date": date} for row in rows],
    }
    write_result(path, device, report)


def check(choices: dict[Key, Choice]) -> None:
    """Every chosen implementation against the one by construction: equal bits."""
    from samebit.kernels.gpu.linear import linear_triton

    for key, choice in choices.items():
        n = key.n * (2 if key.gated else 1)
        weight = torch.randn(n, key.k, device="cuda").mul_(0.02).to(torch.bfloat16)
        x = torch.randn(key.rows, key.k, device="cuda").to(torch.bfloat16)
        dtype = torch.float32 if key.fp32 else torch.bfloat16
        y, wide = (torch.empty(key.rows, m, dtype=dtype, device="cuda") for m in (key.n, n))
        linear_triton(x, weight, wide)
        truth = swiglu(wide) if key.gated else wide
        if choice.tile is not None:
            skinny.matmul(x, weight, y, choice.tile, gated=key.gated)
        else:
            cublaslt.matmul(x, weight, y, choice.cublaslt)
        if not torch.equal(y, truth):
            raise RuntimeError(f"{choice} gives other bits for {key}")


def main(run: BenchKernelsRun) -> int:
    """The command `samebit bench kernels --tune`: writes a table, which counts from now on."""
    config = load_model_config(run.model, run.model_family)
    wanted = sorted({row_bucket(m) for m in run.rows or (*SKINNY_ROWS, *LARGE_ROWS)})
    choices, rows = tune(model_keys(config, wanted))
    check(choices)
    name = table_name(torch.cuda.get_device_name())
    path = run.run_dir / name
    write_table(choices, rows, path)
    kept = user_tables() / name
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, path.read_text())
    print(f"{path} holds the table; engines on this machine use it from {kept}")
    return 0
