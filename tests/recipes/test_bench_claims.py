"""The words and figures of samebit bench mean what they say: whose they are, of which card."""

import json
import subprocess
from pathlib import Path

import pytest

from samebit.recipes.bench import start as start_module
from samebit.recipes.bench.idle import Activity, describe_gpu_times, gpu_times
from samebit.recipes.bench.output import BenchError
from samebit.recipes.bench.peers import load_peers
from samebit.recipes.bench.start import Start, cold_start, compilations, describe
from samebit.recipes.bench.timing import CardRates
from samebit.recipes.cli.main import main
from samebit.recipes.run.provenance import device_name
from samebit.rollout.device import resolve_device
from samebit.trainer.flops import PEAK_FLOPS

CPU = resolve_device("cpu")
PEER = {
    "engine": "other",
    "version": "1.2",
    "card": "a card",
    "date": "2026-01-31",
    "command": "other bench --seed 0",
    "model": "qwen3",
    "workloads": {"1x1x4x2": 100},
}


@pytest.fixture
def peers_file(tmp_path):
    """Writes entries, each PEER with changes; the path."""

    def write(*changes):
        path = tmp_path / "peers.json"
        path.write_text(json.dumps([PEER | change for change in changes]))
        return path

    return write


def without(name):
    return {key: value for key, value in PEER.items() if key != name}


@pytest.mark.parametrize("name", PEER)
def test_a_figure_without_its_origin_is_refused(tmp_path, name):
    """Whatever is missing is named, with file and entry."""
    path = tmp_path / "peers.json"
    path.write_text(json.dumps([PEER, without(name)]))
    with pytest.raises(ValueError, match=rf"peers: entry 2 of .*json does not name its {name}$"):
        load_peers(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": " "}, "engine is ' '; it must be text"),
        ({"date": 2026}, "date is 2026; it must be text"),
        ({"note": "best"}, "has note; it may have engine, version"),
        ({"workloads": {}}, "workloads is {}; it must give"),
        ({"workloads": {"1x1": 5}}, "workload '1x1' is not prompts x samples"),
        ({"workloads": {"1x1x4x2": "5"}}, "1x1x4x2 is '5'; it must be tokens per second"),
        ({"workloads": {"1x1x4x2": True}}, "1x1x4x2 is True; it must be"),
        ({"workloads": {"1x1x4x2": 0}}, "1x1x4x2 is 0; it must be"),
        ({"workloads": {"1x1x4x2": float("nan")}}, "1x1x4x2 is nan; it must be"),
        ({}, "entries 1 and 2 .* are both other 1.2 on a card with qwen3"),
    ],
)
def test_wrong_entries_say_what_is_wrong(peers_file, change, message):
    with pytest.raises(ValueError, match=message) as error:
        load_peers(str(peers_file({}, change)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON"), ("{}", "a list of entries"), ("[]", "at least one"),
                          ("[1]", "entry 1 of .* is no object with engine")]
)  # fmt: skip
def test_wrong_files_are_refused_before_an_engine_is_made(
    tmp_path, qwen3_path, capsys, text, message
):
    path = tmp_path / "peers.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_peers(str(path))
    arguments = [f"model={qwen3_path}", f"output_dir={tmp_path}", "device=cpu", f"peers={path}"]
    assert main(["bench", "engine", *arguments]) == 1
    assert str(path) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["peers.json"]


def test_peers_are_printed_beside_the_same_card_model_and_workload(
    peers_file, tmp_path, qwen3_path, capsys
):
    """And nowhere else; with the file's words, and in the report."""
    here = {"card": device_name(CPU)}
    path = peers_file(
        here,
        here | {"engine": "third", "workloads": {"9x9x9x9": 1}},
        here | {"engine": "fourth", "model": "qwen3-8b"},
        {"engine": "fifth", "card": "NVIDIA H200"},
    )
    arguments = [f"model={qwen3_path}", f"output_dir={tmp_path}", "device=cpu", "repeats=1"]
    arguments += ["workloads=[1x1x4x2,2x1x4x2]", "engine.kv_cache_tokens=4096", f"peers={path}"]
    assert main(["bench", "engine", *arguments]) == 0
    output = capsys.readouterr().out
    report = json.loads((tmp_path / "bench_engine" / "bench.json").read_text())
    assert report["peers"] == [PEER | here]
    workloads = report["variants"]["default"]["workloads"]
    assert workloads["1x1x4x2"]["peers_tokens_s"] == {"other 1.2": 100}
    assert "peers_tokens_s" not in workloads["2x1x4x2"]
    assert f"other 1.2: not measured here; {here['card']}, 2026-01-31, other bench" in output
    for name in ("third", "fourth", "fifth"):
        assert name not in output
    arguments[-1] = f"peers={peers_file({})}"
    assert main(["bench", "engine", *arguments]) == 0
    output = capsys.readouterr().out
    assert "has nothing of qwen3 on" in output
    assert "other 1.2" not in output


def test_a_waiting_kernel_is_counted_and_said():
    """Two steps of 1 ms: a kernel that starts early and waits overlaps, the host's time shows."""
    activities = [
        Activity(0.0, 400.0, "product"),
        Activity(300.0, 700.0, "waits for the product"),
        Activity(1000.0, 1500.0, "product"),
    ]
    found = gpu_times(activities, step_ms=1.0, recorded_ms=1.25, num_steps=2)
    assert found == {
        "step_ms": 1.0,
        "step_ms_recorded": 1.25,
        "gpu_busy_ms": pytest.approx(0.6),
        "gpu_sum_ms": pytest.approx(0.65),
        "not_busy_ms": pytest.approx(0.4),
        "not_busy_share": pytest.approx(0.4),
        "gaps_ms": pytest.approx(0.15),
        "gaps_share": pytest.approx(0.2),
        "longest_gap_us": 300.0,
    }
    assert describe_gpu_times(found) == (
        "decode step 1.000 ms (1.250 while recorded); for 0.600 ms a kernel, copy or fill is on "
        "the GPU, those that wait included (durations sum to 0.650 ms), for 0.400 ms (40.0%) none "
        "is; gaps within the recording 0.150 ms (20.0%), the longest 300.0 us"
    )


def test_a_steps_length_is_that_without_recording():
    """A trace without gaps of a step that takes longer than its kernels: not idle 0%."""
    found = gpu_times([Activity(0.0, 600.0, "k")], step_ms=1.0, recorded_ms=0.6, num_steps=1)
    assert (found["gaps_share"], found["not_busy_share"]) == (0.0, pytest.approx(0.4))


def test_the_roofline_is_of_the_rates_that_were_measured():
    rates = CardRates(memory_bytes_s=1e12, flops_s=1e14)
    assert rates.ideal_us(1e9, 1e3) == pytest.approx(10.0)
    assert rates.ideal_us(1e3, 1e9) == pytest.approx(1000.0)
    assert rates.compute_bound(1e9, 1e3)
    assert not rates.compute_bound(1e3, 1e9)
    assert rates.words == (
        "roofline: 1.00 TB/s copied and 100 TFLOP/s multiplied by this card in this run"
    )


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H100 PCIe", False),
        ("NVIDIA H100 NVL", False),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", False),
        ("NVIDIA GH200 480GB", False),
        ("NVIDIA A100-SXM4-80GB", False),
    ],
)
def test_a_peak_is_of_the_whole_name(card, known):
    """A card whose name merely holds a known one's has other figures."""
    assert (card in PEAK_FLOPS) == known


def make_start(path):
    return Start(
        model=str(path), device="cpu", cpu_threads=1, variant="default",
        settings={"kv_cache_tokens": 256, "max_num_seqs": 4},
    )  # fmt: skip


def test_a_cold_start_finds_nothing_that_earlier_runs_left(qwen3_path, tmp_path, monkeypatch):
    """Its self-check is not remembered, nor is the one that it makes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = cold_start(make_start(qwen3_path))
    assert 0 < found["start_s"] < found["first_token_s"] < found["process_s"]
    assert list(tmp_path.iterdir()) == []


def test_a_cold_start_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(start_module.sys, "executable", "/bin/false")
    with pytest.raises(BenchError, match="cold: the engine's process ended with code 1"):
        cold_start(make_start(tmp_path))


def test_compilations_are_counted():
    """Triton tells its listener; a listener that was there before is put back."""
    from triton import knobs

    class Times:
        total = 250_000

    before = knobs.compilation.listener
    with compilations() as found:
        for cache_hit in (False, False, True):
            knobs.compilation.listener(
                src=None, metadata={}, metadata_group={}, times=Times(), cache_hit=cache_hit
            )
    assert found == {"kernels_compiled": 2, "compile_s": 0.5, "kernels_from_cache": 1}
    assert knobs.compilation.listener is before
    start = {"start_s": 30.0, "first_token_s": 33.5}
    assert describe({"start": start | found, "cold_start": start | {"process_s": 40.0}}) == [
        "engine made in 30.0 s, first token after 33.5 s; 2 kernels compiled in 0.5 s, 1 found "
        "compiled on disk",
        "cold, engine made in 30.0 s, first token after 33.5 s, 40.0 s after its process was "
        "started",
    ]


def test_the_measuring_script_names_its_parts():
    """Before it measures anything; it takes no commit by hand and no fixed port."""
    script = Path(__file__).parents[2] / "docs" / "results" / "measure.sh"
    run = subprocess.run([script, "out", "engines"], capture_output=True, text=True)
    assert run.returncode == 2
    message = "'engines' is no part; there are: verify verify_8b verify_8b_parts verify_0.6b "
    rest = "verify_smollm2 engine groups tables "
    rest += "speculative kernels trainer memory sync step kills algorithms draft_7 draft_1 "
    rest += "draft_boards speculative_draft adaptive_draft block_draft online_draft draft_trainer "
    rest += "verify_rows long_tail tensor_parallel trainer_tp elastic transfers async controller "
    rest += "transfers4 layouts tp1_tp4 eight_tp eight_steps eight_elastic eight_transfers "
    rest += "eight_sums "
    assert run.stderr == f"{message}{rest}\n"
    text = script.read_text()
    for part in run.stderr.split(": ")[1].split():
        assert f"\n{part}() {{" in text
    assert {"SAMEBIT_COMMIT", "--master-port"}.isdisjoint(text.split())
