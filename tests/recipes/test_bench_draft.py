"""samebit bench draft: steps of a draft in small, and the arithmetic behind its figures."""

import json
import math
from dataclasses import replace

import pytest
import torch

from samebit.recipes.bench import draft
from samebit.recipes.bench.config import Pack
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.rollout.models.draft.config import DraftConfig
from samebit.rollout.models.registry import load_model_config


def test_whole_steps_are_timed(qwen3_path, tmp_path, capsys):
    """Two kinds of packs, whole tokens counted."""
    arguments = [f"model={qwen3_path}", f"output_dir={tmp_path}", "device=cpu", "repeats=2"]
    arguments += ["packs=[2x16, 1x24]", "ttt.passes=3", "draft_vocab_size=50"]
    arguments += ["draft_layers=[1,2,3]"]
    assert main(["bench", "draft", *arguments]) == 0
    report = json.loads((tmp_path / "bench_draft" / "bench.json").read_text())
    assert report["draft"]["vocab_size"] == 50
    assert report["ttt"]["passes"] == 3
    target = load_model_config(qwen3_path)
    specs = [spec for spec in target.param_specs() if "layers" not in spec.name]
    specs += DraftConfig.of_target(target, 50, (1, 2, 3)).param_specs()
    assert report["weights_gib"] == sum(math.prod(spec.shape) for spec in specs) * 4 / 2**30
    pairs, single = report["packs"].values()
    assert (pairs["rows"], single["rows"]) == (2 * (16 - 2), 24 - 3)
    for tokens, found in ((32, pairs), (24, single)):
        step = found["step_s"]
        assert step["min"] <= step["median"] <= step["max"]
        assert found["tokens_s"] == pytest.approx(tokens / step["median"])
    assert "1x24" in capsys.readouterr().out


def test_a_steps_operations_by_hand(qwen3_path):
    """4 tokens, of which 2 rows count in each of 2 passes."""
    target = load_model_config(qwen3_path)
    words = ["packs=[1x4]", "draft_vocab_size=10", "draft_layers=[1,2,3]"]
    run = resolve("bench draft", [f"model={qwen3_path}", *words])
    config = draft.draft_of(run, target)
    data = draft.make_batch(Pack(1, 4), target, config, torch.zeros(1), seed=0)
    data = replace(data, batch=replace(data.batch, rows=data.batch.rows[:2]))
    D, F, V, Dh = target.hidden_size, target.ffn_size, target.vocab_size, target.head_dim
    Hq, Hkv = target.num_heads, target.num_kv_heads
    layer = 2 * D * (Hq + 2 * Hkv) * Dh + Hq * Dh * D + D * 2 * F + F * D
    attention = 2 * (2 * Hq * Dh * 4 * 4) // 2
    one_pass = 3 * (2 * 4 * layer + attention + 2 * 2 * D * 10)
    fused = 2 * (2 * 4 * 3 * D * D)
    assert draft.step_flops(config, data, 2) == fused + 2 * 2 * D * V + 2 * one_pass


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["packs=[1x2000]"], "packs: 1x2000 = 2000 tokens; the model's context"),
        (["draft_vocab_size=400"], "draft_vocab_size is 400; the target has 331 tokens"),
        (["packs=[1x8]", "draft_layers=[1,9]"], "draft_layers: captured_layers"),
        (["draft_vocab_size=0"], "draft_vocab_size is 0; it must be positive"),
        (["packs=[4096]"], "pack '4096' is not sequences x length"),
        (["repeats=0"], "repeats is 0"),
        (["ttt.eval_passes=3"], "ttt.eval_passes is 3; it must be 5, its default"),
    ],
)
def test_what_it_cannot_measure_is_refused(qwen3_path, tmp_path, capsys, overrides, message):
    """In one line, and without a report."""
    arguments = [f"model={qwen3_path}", f"output_dir={tmp_path}", "device=cpu", *overrides]
    assert main(["bench", "draft", *arguments]) != 0
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("bench.json"))
