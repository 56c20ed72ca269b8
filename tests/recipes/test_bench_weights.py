"""samebit bench memory and bench sync: what they measure, on the CPU and in small."""

import json

import pytest
import torch

from samebit.recipes.bench import memory
from samebit.recipes.bench.bars import Bars
from samebit.recipes.bench.memory import require_no_growth
from samebit.recipes.bench.output import BenchError
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.recipes.launch.updates import Source
from samebit.rollout.engine import Engine
from samebit.weight_sync.mapping import plain

SMALL = ["workload=2x2x9x4", "engine.kv_cache_tokens=4096", "engine.max_num_seqs=8", "device=cpu"]


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("memory", "cycles=0", "cycles is 0; it must be positive"),
        ("memory", "workload=2x2", "workload '2x2' is not prompts x samples"),
        ("memory", "engine.weights_backup=true", "engine.weights_backup is True"),
        ("sync", "transports=[]", "transports is .*at least one"),
        ("sync", "transports=[stages]", "transports is 'stages'; it must be one of"),
        ("sync", "repeats=0", "repeats is 0"),
        ("sync", "load_format=none", "load_format is 'none'; it must be one of"),
    ],
)
def test_wrong_settings_say_what_is_wrong(command, override, message):
    """Before anything runs."""
    with pytest.raises(ConfigError, match=message):
        resolve(f"bench {command}", ["model=m", override])


def test_bench_memory_end_to_end(qwen3_path, tmp_path, capsys):
    """Every tag that has memory on a CPU, with and without a backup, and cycles of all."""
    arguments = [f"model={qwen3_path}", f"output_dir={tmp_path}", *SMALL, "repeats=1", "cycles=2"]
    assert main(["bench", "memory", *arguments]) == 0
    report = json.loads((tmp_path / "bench_memory" / "bench.json").read_text())
    rows = report["rows"]
    assert list(rows) == ["weights", "kv_cache", "all", "weights, backup", "all, backup"]
    weights, cache = rows["weights"]["bytes"]["weights"], rows["kv_cache"]["bytes"]["kv_cache"]
    assert cache == 4096 * 768  # bytes of a token
    assert rows["all"]["bytes"] == {"weights": weights, "kv_cache": cache}
    for name, row in rows.items():
        assert ("bytes_back_s" in row) is name.endswith("backup")
        assert row["tokens_compared"] == 2 * 2 * 4
        assert row["used_bytes"] > 0
    assert report["cycles"]["count"] == 2
    assert report["cycles"]["tokens_compared"] == 2 * 16
    output = capsys.readouterr().out
    assert "resident GiB" in output
    assert f"{(5 + 2) * 16} tokens and their log-probs compared: all were equal" in output


def test_other_tokens_after_a_resume_end_the_bench(qwen3_path, tmp_path, monkeypatch, capsys):
    """A fast resume of something else is no resume."""
    resume = Engine.resume_memory_occupation

    def forget(engine, tags=None):
        found = resume(engine, tags)
        if engine.config.weights_backup:
            engine.weights["decoder.final_layernorm.weight"].mul_(2.0)
        return found

    monkeypatch.setattr(Engine, "resume_memory_occupation", forget)
    arguments = [f"model={qwen3_path}", f"output_dir={tmp_path}", *SMALL, "repeats=1", "cycles=1"]
    assert main(["bench", "memory", *arguments]) == 1
    assert "after release and resume of weights, backup: 4 of 4" in capsys.readouterr().err


def test_growth_is_an_error_on_a_gpu():
    """Of what torch has reserved, and of what is in use."""
    still = {"count": 9, "reserved_bytes": [5, 5], "used_bytes": [7, 6]}
    require_no_growth(still, torch.device("cuda"))
    for key in ("reserved_bytes", "used_bytes"):
        with pytest.raises(BenchError, match=f"9 cycles: {key} grew from 7 to 8"):
            require_no_growth(still | {key: [7, 8]}, torch.device("cuda"))
        require_no_growth(still | {key: [7, 8]}, torch.device("cpu"))


def test_a_process_knows_what_it_uses():
    """Memory that was just written is in use."""
    before = memory.used_bytes(torch.device("cpu"))
    block = torch.ones(64 << 18)
    assert memory.used_bytes(torch.device("cpu")) - before >= 60 << 20
    assert block.any()


def test_bench_sync_end_to_end(qwen3_path, tmp_path, capsys):
    """The transports that a CPU has, each with the same bits, and one that it has not."""
    arguments = [f"model={qwen3_path}", f"output_dir={tmp_path}", *SMALL, "repeats=1"]
    assert main(["bench", "sync", *arguments, "transports=[alias,nccl]"]) == 1
    assert "transports: nccl needs CUDA devices: 2, there are 0" in capsys.readouterr().err
    assert main(["bench", "sync", *arguments]) == 0
    report = json.loads((tmp_path / "bench_sync" / "bench.json").read_text())
    assert list(report["transports"]) == ["alias", "gloo", "file"]
    for name, found in report["transports"].items():
        parts = found["digest_s"], found["update_s"], found["first_token_s"]
        assert 0 < sum(part["median"] for part in parts) <= found["window_s"]["median"]
        assert ("bytes_s" in found) is ("transfer_s" in found) is (name == "gloo")
        assert found["tokens_compared"] == 2 * 16, name
    assert {f["bytes"] for f in report["transports"].values()} == {found["bytes"]}
    assert "96 tokens and their log-probs compared" in capsys.readouterr().out


def test_a_source_has_two_versions():
    """Of different digests, and the first one again to the bit."""
    spec = plain("p", "hf", (8, 4))
    source = Source({"p": torch.randn(8, 4)}, [spec])
    first, bits = source.version, source.params["p"].clone()
    source.change()
    second = source.version
    assert (first.step, second.step) == (0, 1)
    assert first.digest != second.digest
    source.change()
    assert source.version.digest == first.digest
    assert torch.equal(source.params["p"], bits)


def test_bars_stand_where_card_and_model_are_theirs():
    """A bar beside another card's figure would be a lie."""
    bars = Bars("NVIDIA H100 80GB HBM3", "qwen3-8b")
    assert (bars.free_gib, Bars("NVIDIA H200", "Qwen3-8B").free_gib) == (77.0, 137.0)
    assert bars.beside(99.96, 100.0) == "100.0 (<= 100)"
    assert bars.beside(101.0, 100.0) == "101.0 (<= 100 MISSED)"
    assert bars.beside(39.0, 40.0, least=True) == "39.0 (>= 40 MISSED)"
    assert bars.beside(3.0, None) == "3.0"
    for other in (Bars("NVIDIA GH200 480GB", "qwen3-8b"), Bars("NVIDIA H100", "qwen3-4b")):
        assert other.free_gib is None
        assert other.beside(101.0, 100.0) == "101.0"
