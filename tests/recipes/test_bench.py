"""samebit bench: what it measures, on the CPU and in small; the arithmetic behind its figures."""

import json
from functools import partial

import pytest
import torch

from samebit.kernels import linear as linear_op
from samebit.recipes.bench import kernels
from samebit.recipes.bench.config import Workload
from samebit.recipes.bench.engine import BenchError, timed_run
from samebit.recipes.bench.idle import (
    Activity,
    IdleTime,
    gpu_activities,
    idle_time,
    num_prefill_steps,
    top_activities,
)
from samebit.recipes.bench.output import format_table
from samebit.recipes.bench.prompts import PromptSource, sampling_params
from samebit.recipes.bench.roofline import roofline_tokens_s
from samebit.recipes.bench.timing import CardRates, Spread, num_copies
from samebit.recipes.bench.trainer import communication
from samebit.recipes.bench.variants import torch_kernels
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.rollout.engine import Engine
from samebit.rollout.models.llama import Llama
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.running_sample import Status


def make_engine(path, **settings):
    defaults = {"kv_cache_tokens": 4096, "max_num_seqs": 16, "max_batch_tokens": 256}
    return Engine(path, device="cpu", **(defaults | settings))


def test_workloads_are_parsed():
    """The syntax of the command line, both ways."""
    workload = Workload.parse("64x8x512x256")
    assert workload == Workload(64, 8, 512, 256)
    assert str(workload) == "64x8x512x256"
    assert (workload.num_seqs, workload.output_tokens) == (512, 512 * 256)
    run = resolve("bench engine", ["model=m", "workloads=[64x8x512x512, 1x1x512x256]"])
    assert run.workloads == ["64x8x512x512", "1x1x512x256"]


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("engine", "workloads=[64x8x512]", "workload '64x8x512' is not prompts x samples"),
        ("engine", "workloads=[0x8x512x512]", "workload '0x8x512x512' is not"),
        ("engine", "workloads=[64]", "workload '64' is not"),
        ("engine", "workloads=[]", "workloads is .*at least one"),
        ("engine", "variants=[fast]", "variants is 'fast'; it must be one of"),
        ("engine", "repeats=0", "repeats is 0"),
        ("engine", "engine.max_seqs=1", "max_seqs"),
        ("kernels", "tables=[linear, moe]", "tables is 'moe'; it must be one of"),
        ("kernels", "rows=[0]", "rows is"),
        ("kernels", "rows=[]", "rows is .*at least one"),
        ("trainer", "parallel.context=2", "parallel.context is 2; it must be 1 to compare"),
        ("kernels", "repeats=3", "repeats"),
        ("trainer", "packs=[8x1]", "pack '8x1' is not sequences x length"),
        ("trainer", "packs=[]", "packs is .*at least one"),
        ("trainer", "tokens_per_step=0", "tokens_per_step is 0"),
        ("trainer", "parallel.tensor=0", "trainer.parallel.tensor is 0"),
        ("trainer", "parallel.offload_segment_sums=true", "gradients have no segments"),
    ],
)
def test_wrong_settings_say_what_is_wrong(command, override, message):
    """Before anything runs, in one line."""
    with pytest.raises(ConfigError, match=message) as error:
        resolve(f"bench {command}", ["model=m", override])
    assert "\n" not in str(error.value)


def test_commands_of_two_words(capsys):
    """Help at each level, and misspellings."""
    assert main(["bench"]) == 2
    usage = capsys.readouterr().out
    assert "  bench engine" in usage
    assert "  grpo" not in usage
    assert main(["bench", "--help"]) == 0
    assert main(["bench", "engines", "model=m"]) == 2
    assert "no command 'bench engines'" in capsys.readouterr().err
    assert main(["bench", "engine"]) == 2
    assert capsys.readouterr().err == "samebit bench engine: required: model=...\n"


def test_flags_are_short_for_true(monkeypatch, tmp_path):
    """--tune and --profile."""
    seen = []
    monkeypatch.setattr(kernels, "main", lambda run: seen.append(run) or 0)
    assert main(["bench", "kernels", "model=m", "--tune"]) == 0
    assert main(["bench", "kernels", "model=m", "--replays=7"]) == 0
    assert [(run.tune, run.replays) for run in seen] == [(True, 20), (False, 7)]


def test_bench_engine_end_to_end(qwen3_path, tmp_path, capsys):
    """Two variants of two workloads: the report's fields, the table, exact token counts."""
    arguments = [
        f"model={qwen3_path}",
        f"output_dir={tmp_path}",
        "device=cpu",
        "workloads=[2x3x9x5, 1x1x4x2]",
        "variants=[default, torch_kernels]",
        "repeats=2",
        "engine.kv_cache_tokens=4096",
        "engine.max_num_seqs=8",
    ]
    assert main(["bench", "engine", *arguments]) == 0
    output = capsys.readouterr().out
    report = json.loads((tmp_path / "bench_engine" / "bench.json").read_text())
    assert {"command", "commit", "device", "versions", "numerics", "model"} <= report.keys()
    assert report["engine"] == {
        "kv_cache_tokens": 4096,
        "max_batch_tokens": 8192,
        "max_num_seqs": 8,
    }
    assert list(report["variants"]) == ["default", "torch_kernels"]
    for entry in report["variants"].values():
        assert 0 < entry["start"]["start_s"] < entry["start"]["first_token_s"]
        assert list(entry["workloads"]) == ["2x3x9x5", "1x1x4x2"]
        found = entry["workloads"]["2x3x9x5"]
        assert (found["output_tokens"], found["input_tokens"]) == (30, 18)
        assert len(found["seconds"]) == 2
        rates = found["output_tokens_s"]
        assert rates["min"] <= rates["median"] <= rates["max"]
        assert rates["max"] == pytest.approx(30 / min(found["seconds"]))
        assert {"peers_tokens_s", "roofline_tokens_s"}.isdisjoint(found)  # of no card
    table = [line.split() for line in output.splitlines() if "x9x5" in line][-2:]
    assert [row[:2] for row in table] == [["default", "2x3x9x5"], ["torch_kernels", "2x3x9x5"]]
    assert table[0][6] == "1.00"
    assert "all other operations stay the engine's" in output
    assert "roofline" not in output


def test_bench_trainer_end_to_end(qwen3_path, tmp_path, capsys):
    """Two kinds of packs, whole tokens counted, log-probs compared."""
    arguments = [
        f"model={qwen3_path}",
        f"output_dir={tmp_path}",
        "device=cpu",
        "packs=[2x16, 1x24]",
        "tokens_per_step=64",
        "repeats=2",
    ]
    assert main(["bench", "trainer", *arguments]) == 1
    assert (
        "compare=true times torch's flash attention: it needs a CUDA device"
        in capsys.readouterr().err
    )
    assert main(["bench", "trainer", *arguments, "compare=false"]) == 0
    report = json.loads((tmp_path / "bench_trainer" / "bench.json").read_text())
    assert list(report["packs"]) == ["2x16", "1x24"]
    pairs, single = report["packs"].values()
    assert (pairs["tokens_per_step"], pairs["micro_batches"]) == (64, 2)
    assert (single["tokens_per_step"], single["micro_batches"]) == (72, 3)
    assert pairs["own_logprobs_compared"] == 4 * (16 - 2)
    assert pairs["step_s"]["min"] <= pairs["step_s"]["median"] <= pairs["step_s"]["max"]
    output = capsys.readouterr().out
    assert "2x16" in output
    compared = 4 * (16 - 2) + 3 * (24 - 3)
    assert f"{compared} of the trainer's own log-probs compared" in output
    assert report["mfu_peak"].startswith("unknown for ")
    assert report["mfu_peak"] in output
    assert report["device"] in report["mfu_peak"]


def test_bench_refuses_what_it_cannot_measure(qwen3_path, tmp_path, capsys):
    """One line each, exit code 1, and no report."""
    common = [f"output_dir={tmp_path}", "device=cpu"]
    model = f"model={qwen3_path}"
    for command, arguments, message in (
        ("engine", ["model=/no/such/model"], "model folder /no/such/model does not exist"),
        ("engine", [model, "--profile"], "it needs a CUDA device"),
        ("engine", [model, "workloads=[1x1x1000x99]"], "exceed the context of 1024 tokens"),
        ("kernels", [model], "bench kernels needs a CUDA device"),
    ):
        assert main(["bench", command, *common, *arguments]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_prompts_and_sample_ids_never_repeat(qwen3_path):
    """Else a later run would find its prompts in the prefix cache, or draw the same noise."""
    source, workload = PromptSource(331, seed=0), Workload(3, 2, 16, 4)
    prompts, ids = zip(*(source.draw(workload) for _ in range(4)), strict=True)
    assert len({tuple(p) for run in prompts for p in run}) == 12
    assert sorted(i for run in ids for group in run for i in group) == list(range(24))
    assert PromptSource(331, seed=0).draw(workload)[0] == prompts[0]


def test_a_run_that_returns_too_little_is_an_error(qwen3_path, monkeypatch):
    """A rate of tokens that were not drawn would be a lie."""
    engine = make_engine(qwen3_path)
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *args: generate(*args)[:1])
    with pytest.raises(BenchError, match="2x1x4x3"):
        timed_run(engine, PromptSource(331, 0), Workload(2, 1, 4, 3))


def test_torch_kernels_are_put_back():
    """A variant must not leak into the next."""
    before = linear_op._forward.implementations["cpu"]
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with torch_kernels("cpu") as calls:
        assert torch.allclose(linear_op.linear(x, weight), x @ weight.t())
        assert calls.count == 1
    assert linear_op._forward.implementations["cpu"] is before


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([], IdleTime(0, 0, 0)),
        ([(5, 8)], IdleTime(3, 0, 0)),
        ([(0, 2), (3, 5), (9, 10)], IdleTime(5, 5, 4)),
        ([(9, 10), (0, 2), (3, 5)], IdleTime(5, 5, 4)),  # any order
        ([(0, 4), (2, 6), (6, 7)], IdleTime(7, 0, 0)),  # streams overlap
        ([(0, 10), (2, 3), (4, 5), (12, 13)], IdleTime(11, 2, 2)),  # one within another
    ],
)
def test_idle_time(intervals, expected):
    """Gaps between merged intervals."""
    assert idle_time(intervals) == expected


def test_communication_of_a_step():
    """Seconds of our sums and of NCCL's kernels, whichever collective; nothing else."""
    activities = [
        Activity(0.0, 2e5, "_sum_kernel"),
        Activity(3e5, 4e5, "_sum_kernel"),
        Activity(0.0, 5e5, "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"),
        Activity(0.0, 9e5, "_attend_kernel"),
    ]
    assert communication(activities) == pytest.approx({"sums_s": 0.3, "nccl_s": 0.5})


def test_idle_share_of_a_trace():
    """Only what runs on the GPU counts."""

    def event(cat, ts, dur, name="k", ph="X"):
        return {"ph": ph, "cat": cat, "ts": ts, "dur": dur, "name": name}

    trace = {
        "traceEvents": [
            event("kernel", 0.0, 4.0, "gemm"),
            event("cuda_runtime", 0.0, 100.0, "cudaGraphLaunch"),
            event("gpu_memcpy", 6.0, 1.0, "copy"),
            event("gpu_memset", 7.0, 1.0),
            event("kernel", 8.0, 2.0, "gemm"),
            {"ph": "M", "name": "process_name"},
        ]
    }
    activities = gpu_activities(trace)
    found = idle_time((start, end) for start, end, _ in activities)
    assert found == IdleTime(8.0, 2.0, 2.0)
    assert found.idle_share == pytest.approx(0.2)
    assert top_activities(activities, 2)[0] == {"name": "gemm", "calls": 1.0, "us": 3.0}


@pytest.mark.leaves_requests
@pytest.mark.parametrize("text", ["4x2x60x40", "1x1x200x40", "8x2x7x40"])
def test_prefill_steps_suffice(qwen3_path, text):
    """The profile's window must hold decode steps alone."""
    engine = make_engine(qwen3_path, max_batch_tokens=64, prefill_chunk=24)
    workload = Workload.parse(text)
    for prompt, ids in zip(*PromptSource(331, 0).draw(workload), strict=True):
        engine.add_request(prompt, sampling_params(workload), ids)
    for _ in range(num_prefill_steps(engine, workload)):
        assert engine.step() == []
    stands = [s.status for request in engine.loop.book.live.values() for s in request.samples]
    assert stands == [Status.DECODING] * workload.num_seqs
    with pytest.raises(ValueError, match="engine.max_num_seqs is 16"):
        num_prefill_steps(engine, Workload(17, 1, 8, 8))


def test_the_roofline_of_one_sequence():
    """At batch 1 it is the time to read the weights; the embedding is only looked up."""
    config = Llama(
        architecture="x", num_layers=10, hidden_size=1024, num_heads=8, num_kv_heads=8,
        head_dim=128, ffn_size=1024, vocab_size=2048, max_position=4096, norm_eps=1e-6,
        rope_theta=1e4, rope_scaling=None, tie_embeddings=False, eos_token_ids=(),
    )  # fmt: skip
    read = 10 * (4 + 3) * 1024**2 + 2048 * 1024
    keys = 2 * 2 * 10 * 8 * 128 * (1 + 1000)
    rate = roofline_tokens_s(config, Workload(1, 1, 1, 2001), CardRates(4e12, 7e14))
    assert rate == pytest.approx(4e12 / (2 * read + keys), rel=2e-3)
    halved = roofline_tokens_s(config, Workload(1, 1, 1, 2001), CardRates(2e12, 7e14))
    assert halved == pytest.approx(rate / 2, rel=2e-3)


def test_small_helpers():
    """Spreads, tables, rotation."""
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    table = format_table([["a", "b", "c"], ["long", "1", "22.5"]], num_left=1)
    assert table == "a     b     c\nlong  1  22.5"
    assert num_copies(33 << 20) == 8
    assert num_copies(1 << 30) == 1


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """The kernel benchmarks' own code, with every action called once and nothing timed."""

    def run_once(ways, expected_us, replays, sustained=False):
        assert expected_us > 0
        assert len({len(actions) for actions in ways}) == 1
        for actions in ways:
            for action in actions[:2]:
                action()
        return [Spread(2.0, 1.0, 3.0)] * len(ways)

    monkeypatch.setattr(kernels, "_CUDA", torch.device("cpu"))
    monkeypatch.setattr(kernels, "_randn", partial(torch.randn))
    monkeypatch.setattr(kernels, "_BF16", torch.float32)
    monkeypatch.setattr(kernels, "_MAX_PLANS", 2)
    monkeypatch.setattr(kernels, "num_copies", lambda num_bytes: 2)
    monkeypatch.setattr(kernels, "graphs_us", run_once)
    monkeypatch.setattr(kernels, "graph_us", lambda actions, *how: run_once([actions], *how)[0])
    monkeypatch.setattr(kernels, "card_rates", lambda: CardRates(1e12, 1e14))
    monkeypatch.setattr(kernels, "_torch_logits", lambda x, weight: x @ weight.t())
    monkeypatch.setattr(kernels, "DECODE", ((1, 64), (3, 128)))
    monkeypatch.setattr(kernels, "PREFILL", ((2, 32),))
    monkeypatch.setattr(kernels, "TRAINING", ((2, 32),))
    monkeypatch.setattr(kernels, "FEW_ROWS", (1, 5))


@torch.no_grad()
def test_bench_kernels_without_a_gpu(qwen3_path, kernels_on_cpu):
    """Every table's code runs at the model's shapes, and its arithmetic holds."""
    config = load_model_config(qwen3_path)
    run = resolve("bench kernels", [f"model={qwen3_path}", "rows=[1, 40]"])
    tables = {name: bench(config, run) for name, bench in kernels.BENCHES.items()}
    linear = tables["linear"]
    assert [row["shape"] for row in linear] == [
        name for name in ("qkv", "o", "gate_up", "down", "lm_head") for _ in range(2)
    ] + ["layer"] * 2 + ["layer in turn"] * 2
    assert linear[-3] == {
        "shape": "layer", "m": 40, "us": 8.0, "torch_us": 8.0, "ratio": 1.0,
        "roofline": pytest.approx(sum(r["roofline"] for r in linear[1:8:2]) / 4),
    }  # fmt: skip
    assert tables["attention"][1]["gb_s"] == pytest.approx(3 * 128 * 2 * 16 * 2 * 2 / 2e3)
    assert tables["prefill"][0]["ratio"] == tables["training"][0]["ratio"] == 1.0
    ratio = tables["training"][0]["tflop_s"] / tables["prefill"][0]["tflop_s"]
    assert ratio == pytest.approx(3.5)
    assert not torch.are_deterministic_algorithms_enabled()
    operations = {row["operation"] for row in tables["rows"]}
    assert operations >= {"rms_norm", "swiglu", "draw_with_logprobs"}
    for rows in tables.values():
        assert len(kernels.table_of(rows).splitlines()) == len(rows) + 1
