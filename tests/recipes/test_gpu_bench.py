"""The kernel benchmarks' timing and tuner on the card; no figure is looked at."""

import json
from dataclasses import fields
from itertools import islice
from pathlib import Path

import pytest
import torch

from samebit.recipes.cli.compose import resolve
from samebit.rollout.models.registry import load_model_config

pytestmark = pytest.mark.gpu

SHAPE = Path(__file__).parents[2] / "recipes" / "bench" / "shapes" / "qwen3-0.6b"


def test_ways_are_replayed_equally_often():
    """Once by themselves, 500 times in a graph that is replayed 2 + 4 * (1 + 2) times."""
    from samebit.recipes.bench.timing import graphs_us

    counts = [torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2)]
    spreads = graphs_us([[lambda c=count: c.add_(1)] for count in counts], 2.0, replays=5)
    assert [int(count) for count in counts] == [1 + 500 * 14] * 2
    assert all(0 < s.min <= s.median <= s.max for s in spreads)


def test_the_card_is_measured_once():
    """Its rates are numbers of its own, and its memory is given back."""
    from samebit.recipes.bench.timing import card_rates

    before = torch.cuda.memory_reserved()
    rates = card_rates()
    assert min(rates.memory_bytes_s, rates.flops_s) > 0
    assert card_rates() is rates
    assert torch.cuda.memory_reserved() <= before + (64 << 20)


def test_graphs_that_are_captured_are_counted():
    """Whoever captures them; and no longer behind the block."""
    from samebit.recipes.bench.timing import captures

    x = torch.zeros(3, device="cuda")

    def capture():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)
        graph.replay()

    with captures() as num_captured:
        assert num_captured() == 0
        capture()
        capture()
        assert num_captured() == 2
    capture()
    assert num_captured() == 2
    assert x.tolist() == [3.0] * 3


def test_kernels_that_are_compiled_are_counted(tmp_path, monkeypatch):
    """Once into an empty cache, then from it."""
    from samebit.kernels.gpu import swiglu
    from samebit.recipes.bench.start import compilations

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gate_up = torch.randn(3, 64, device="cuda").to(torch.bfloat16)
    counts = []
    for _ in range(2):
        for kernel in vars(swiglu).values():
            if hasattr(kernel, "device_caches"):
                kernel.device_caches.clear()  # as in a new process
        with compilations() as found:
            swiglu.swiglu(gate_up)
        counts.append((found["kernels_compiled"], found["kernels_from_cache"]))
    (compiled, none), again = counts
    assert compiled > 0
    assert none == 0
    assert again == (0, compiled)


def test_provenance_names_the_gpu():
    """With what lies beneath torch; and the CPU for what ran there."""
    from samebit.recipes.run.provenance import provenance

    on_gpu, on_cpu = (provenance(["x"], torch.device(name)) for name in ("cuda", "cpu"))
    assert on_gpu["device"] == torch.cuda.get_device_name()
    assert on_gpu["hardware"]["device"] == f"cuda:{torch.cuda.current_device()}"
    assert {"cuda", "cublaslt", "nccl", "driver"} <= on_gpu["versions"].keys()
    assert on_cpu["device"] == on_gpu["hardware"]["cpu"]


def test_tuner_writes_a_table_that_can_be_read(tmp_path, monkeypatch):
    """Of all products at 16 rows, few tiles only; main checks the bits of what it chose."""
    from samebit.kernels.gpu import tuning
    from samebit.recipes.bench import tune

    every_tile = tune.tiles
    monkeypatch.setattr(tune, "tiles", lambda *product: islice(every_tile(*product), 3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = [f"model={SHAPE}", "tune=true", "rows=[16]", f"output_dir={tmp_path}"]
    assert tune.main(resolve("bench kernels", arguments)) == 0
    (path,) = tmp_path.glob("*_kernels/*.json")
    measured = json.loads(path.read_text())["measured_us"]
    keys = {
        tuning.Key(**{field.name: row[field.name] for field in fields(tuning.Key)})
        for row in measured
    }
    assert keys >= set(tune.model_keys(load_model_config(str(SHAPE)), [16]))
    name = torch.cuda.get_device_name()
    assert (tmp_path / "samebit" / "tables" / tuning.table_name(name)).exists()
    assert keys <= set(tuning.own_choices(name))
