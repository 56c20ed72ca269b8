"""The kernel benchmarks' timing and tuner on the card; no figure is looked at."""

import json
from dataclasses import fields
from itertools import islice
from pathlib import Path

import pytest
import torch

from samebit.recipes.compose import resolve
from samebit.rollout.models.registry import load_model_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPE = Path(__file__).parents[2] / "recipes" / "bench" / "shapes" / "qwen3-0.6b"


def test_ways_are_replayed_equally_often():
    """Once by themselves, 500 times in a graph that is replayed 2 + 4 * (1 + 2) times."""
    from samebit.recipes.bench.timing import graphs_us

    counts = [torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2)]
    spreads = graphs_us([[lambda c=count: c.add_(1)] for count in counts], 2.0, replays=5)
    assert [int(count) for count in counts] == [1 + 500 * 14] * 2
    assert all(0 < s.min <= s.median <= s.max for s in spreads)


def test_tuner_writes_a_table_that_can_be_read(tmp_path, monkeypatch):
    """Of all products at 16 rows, few tiles only; main checks the bits of what it chose."""
    from samebit.kernels.gpu import tuning
    from samebit.recipes.bench import tune

    every_tile = tune.tiles
    monkeypatch.setattr(tune, "tiles", lambda *product: islice(every_tile(*product), 3))
    arguments = [f"model={SHAPE}", "tune=true", "rows=[16]", f"output_dir={tmp_path}"]
    assert tune.main(resolve("bench kernels", arguments)) == 0
    (path,) = tmp_path.glob("*/*.json")
    measured = json.loads(path.read_text())["measured_us"]
    keys = {
        tuning.Key(**{field.name: row[field.name] for field in fields(tuning.Key)})
        for row in measured
    }
    assert keys >= set(tune.model_keys(load_model_config(str(SHAPE)), [16]))
    monkeypatch.setattr(tuning, "TABLES", path.parent)
    tuning._table.cache_clear()
    try:
        assert set(tuning._table(0)) <= keys
    finally:
        tuning._table.cache_clear()
