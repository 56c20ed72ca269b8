"""samebit plan: by hand where a hand can count, and against what was measured."""

import dataclasses
import json
import math

import pytest
from megatron.core.parallel_state import RankGenerator

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.models.tiny_model import write_config
from samebit.recipes.plan import make_plan, summary
from samebit.recipes.plan_config import CARDS
from samebit.recipes.planning.layout import Layout
from samebit.recipes.planning.measured import (
    CONSTANTS,
    ENGINE_FILES,
    RESULTS,
    SHAPES,
    from_results,
    measured,
)
from samebit.recipes.planning.sync import pipeline_plan
from samebit.recipes.planning.times import StepModel
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.flops import PEAK_FLOPS

GIB = 2**30
QWEN3_8B = SHAPES / "qwen3-8b"
# Two layers, D = 64, F = 192, 4 query heads and 2 kv heads of 16, 1,000 tokens, tied embeddings.
D, F, V, PADDED, KV = 64, 192, 1000, 1024, 2 * 16
LAYER = D * (4 * 16 + 2 * KV) + 4 * 16 * D + 3 * D * F + 2 * D + 2 * 16  # norms of D, of q and k
ELEMENTS = 2 * LAYER + PADDED * D + D


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "tiny"
    write_config(
        folder, "qwen3", hidden_size=D, intermediate_size=F, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=V,
        tie_word_embeddings=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def qwen3_1_7b(tmp_path_factory):
    """The shape of tests/programs/colocated_step.py."""
    folder = tmp_path_factory.mktemp("plan") / "qwen3-1.7b"
    write_config(
        folder, "qwen3", hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=True, max_position_embeddings=40960,
    )  # fmt: skip
    return folder


def plan_of(folder, *words):
    return make_plan(resolve("plan", [f"model.path={folder}", *words]))


def pairs_of(rows):
    """(measured, planned) by name, as a failing test prints them."""
    return {name: (found, planned, planned / found) for name, (found, planned) in rows.items()}


def test_memory_by_tag_of_a_tiny_model(tiny):
    """bf16 weights, fp32 gradients, masters and two moments; 4 samples of 128 tokens, in pages."""
    words = ["engine.max_num_seqs=4", "rollout.max_prompt_len=100", "rollout.max_new_tokens=28"]
    found = plan_of(tiny, *words)["memory"]["trainer"]
    graphs = int(measured().rollout.graph_bytes_per_logit_byte * 4 * V * 4)
    fixed = {"runtime": 2 * GIB, "weights": 2 * ELEMENTS, "optimizer": 12 * ELEMENTS}
    fixed |= {"reference": 0, "delta_base": 0}
    turns = {"kv_cache": 4 * 128 * 2 * 2 * KV * 2, "cuda_graphs": graphs}
    assert found["rollout"] == fixed | turns | {"gradients": 0, "activations": 0}
    train = found["train"]
    assert train.pop("activations") > 0
    assert train == fixed | {"gradients": 4 * ELEMENTS, "kv_cache": 0, "cuda_graphs": 0}
    # Without release all is there at once; the KV cache is no larger than the samples need.
    together = found["without_release"]
    assert together.pop("activations") > 0
    assert together == fixed | turns | {"gradients": 4 * ELEMENTS}


def test_memory_follows_the_layout(tiny):
    """A stage of two has a layer, an engine of the whole model, and the last a second embedding."""
    words = ["trainer.parallel.pipeline=2", "placement.transport=stages", "algorithm=grpo_kl"]
    words += ["trainer.parallel.data=2", "trainer.parallel.distributed_optimizer=true"]
    found = plan_of(tiny, *words, "numerics.grad_segments=8", "cluster.gpus_per_node=4")
    first, last = (found["memory"][f"stage {i}"]["train"] for i in (0, 1))
    for tags, own in ((first, LAYER + PADDED * D), (last, LAYER + PADDED * D + D)):
        assert tags["weights"] == 2 * (own + ELEMENTS)
        assert tags["reference"] == 2 * own
        assert tags["optimizer"] == 12 * own / 2
        assert tags["gradients"] == 3 * 4 * own  # of 4 segments a copy, two sums wait
    offloaded = plan_of(tiny, "trainer.parallel.offload_optimizer=true")
    assert offloaded["memory"]["trainer"]["train"]["optimizer"] == 0


@pytest.mark.parametrize(
    ("transport", "words"),
    [
        ("alias", []),
        ("alias", ["trainer.parallel.tensor=2", "trainer.parallel.data=2"]),
        ("stages", ["trainer.parallel.pipeline=2", "trainer.parallel.tensor=2"]),
        ("nccl", ["placement=process"]),
    ],
)
def test_sync_bytes_are_what_receivers_hold(tiny, transport, words):
    words = [f"model.path={tiny}", f"placement.transport={transport}", *words]
    run, model = resolve("plan", words), load_model_config(tiny)
    layout, tensor = Layout.of(run, model), run.trainer.parallel.tensor
    held = 2 * sum(
        block.num_rows * math.prod(spec.shape[1:])
        for spec in model.param_specs((0, tensor))
        for block in spec.blocks
    )
    plan, stages = pipeline_plan(model, layout), run.trainer.parallel.pipeline
    assert [plan.bytes_to(i) for i in range(stages)] == [held] * stages
    chosen = make_plan(run)["sync"][0]
    assert chosen["transport"] == transport
    assert chosen["held_bytes"] == held
    if transport == "stages":  # of either engine the other stage's layer, split, and norms
        split = LAYER - 2 * D - 2 * 16
        moved = 2 * (split // tensor + 2 * D + 2 * 16)
        assert moved <= chosen["moved_bytes"] <= moved + 2 * D
        assert chosen["all_bytes"] == tensor * (2 * moved + 2 * D)
    else:
        assert chosen["moved_bytes"] == chosen["all_bytes"] == (0 if transport == "alias" else held)


def test_ranks_are_on_their_gpus(tiny):
    words = ["trainer.parallel.tensor=2", "trainer.parallel.pipeline=2", "trainer.parallel.data=2"]
    words += ["placement.transport=stages", "cluster.nodes=3", "cluster.gpus_per_node=4"]
    found = plan_of(tiny, *words)
    assert [found[key] for key in ("gpus", "idle_gpus", "engines")] == [8, 4, 4]
    places = [(p["node"], p["gpu"], p["tensor"], p["data"], p["stage"]) for p in found["placement"]]
    assert places == [(i // 4, i % 4, i % 2, i // 2 % 2, i // 4) for i in range(8)]
    assert [p["engine"] for p in found["placement"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    apart = plan_of(tiny, "placement=process", "placement.transport=nccl")
    assert apart["placement"][1] == {"engine": 0, "node": 0, "gpu": 1, "trains": False}
    assert list(apart["memory"]) == ["trainer", "engine"]


def test_ranks_are_in_megatrons_order(tiny):
    """The groups that Megatron makes are ranks of which one number alone differs."""
    words = [f"trainer.parallel.{name}=2" for name in ("tensor", "pipeline", "context", "data")]
    run = resolve(
        "plan", [f"model.path={tiny}", *words, "placement.transport=stages", "cluster.nodes=2"]
    )
    places = list(Layout.of(run, load_model_config(tiny)).places())
    generator = RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=2, order="tp-cp-ep-dp-pp")
    axes = {"tp": "tensor", "cp": "context", "dp": "data", "pp": "stage"}
    for token, axis in axes.items():
        for ranks in generator.get_ranks(token):
            others = {
                tuple(getattr(places[r], name) for name in axes.values() if name != axis)
                for r in ranks
            }
            assert len(others) == 1
            assert [getattr(places[r], axis) for r in ranks] == [0, 1]


def test_seconds_by_hand(tiny):
    """An optimizer step of 1,024 samples of 768 tokens, and the sum of its gradients."""
    words = ["rollout.prompts_per_step=128", "rollout.samples_per_prompt=8", "cluster.nodes=2"]
    split = ["trainer.parallel.data=16", "cluster.flops_s=1e12", "cluster.network_bytes_s=1e9"]
    run, model, own = (
        resolve("plan", [f"model.path={tiny}", *words, *split]),
        load_model_config(tiny),
        measured(),
    )
    step = StepModel(run, model, Layout.of(run, model), own)
    products = 6 * (2 * (LAYER - 2 * D - 2 * 16) + V * D) * 64 * 768 / 1e12
    attention = 3 * 64 * (2 * 2 * 4 * 16 * 768**2) / 1e12
    reduce_s = 2 * 15 / 16 * 4 * ELEMENTS / (1e9 * own.links.transfer)
    compute = products / own.training.products + attention / own.training.attention
    assert step.reduce_s() == pytest.approx(reduce_s, rel=1e-12)
    assert step.train_s() == pytest.approx(compute + reduce_s, rel=1e-12)


@pytest.mark.parametrize(
    ("tag", "elements", "words"),
    [
        ("weights", 1, []),
        ("optimizer", 3, []),
        ("gradients", 15, ["placement.release_memory=false"]),
    ],
)
def test_what_does_not_fit_first_is_named(tiny, tag, elements, words):
    """Room for the runtime and so many bytes an element: the tag, what it lacks, what would do."""
    room = 2 + elements * ELEMENTS / GIB
    found = plan_of(tiny, *words, "engine.kv_cache_tokens=1024", f"cluster.gpu_gib={room!r}")
    before = {"weights": 2, "optimizer": 14, "gradients": 18}[tag]
    lacks = 2 * GIB + before * ELEMENTS - int(room * GIB)
    assert (found["shortage"]["tag"], found["shortage"]["num_bytes"]) == (tag, lacks)
    assert found["times"] is None
    assert f"It does not fit (trainer, rollout): {tag} lacks 0.00 GiB" in summary(found)


def test_what_would_fit_fits(tiny):
    """Each remedy, added to the command line, does it; too large a micro-batch is one's cause."""
    words = ["trainer.micro_batch_tokens=1000000", "cluster.gpu_gib=3"]
    found = plan_of(tiny, *words)
    assert (found["shortage"]["tag"], found["shortage"]["phase"]) == ("activations", "train")
    assert "trainer.micro_batch_tokens=768" in found["remedies"]
    for remedy in found["remedies"]:
        assert plan_of(tiny, *words, *remedy.split())["fits"]
    hopeless = ["placement.release_memory=false", "trainer.micro_batch_tokens=1000000"]
    [larger] = plan_of(tiny, *hopeless, "cluster.gpu_gib=1")["remedies"]
    assert plan_of(tiny, *hopeless, larger)["fits"]
    size = int(larger.removeprefix("cluster.gpu_gib="))
    assert not plan_of(tiny, *hopeless, f"cluster.gpu_gib={size - 1}")["fits"]


def test_a_kv_cache_too_small_for_one_sample_is_named(tiny):
    """Where hardly anything is left the engine would take a page; the run needs twelve."""
    found = plan_of(tiny, f"cluster.gpu_gib={2 + (14 * ELEMENTS + 20000) / GIB!r}")["shortage"]
    lacks = (768 - 64) * 2 * 2 * KV * 2
    assert (found["tag"], found["phase"], found["num_bytes"]) == ("kv_cache", "rollout", lacks)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.card=b1"], "cluster.card is 'b1'; it must be one of ('h200', 'h100')"),
        (["cluster.nodes=129"], "cluster.nodes is 129; it must be at most 128 with 8 GPUs a node"),
        (["cluster.nodes=0"], "cluster.nodes is 0; it must be at least 1"),
        (["cluster.hbm_bytes_s=-1"], "cluster.hbm_bytes_s is -1.0; it must be positive"),
        (["device=cpu"], "device is 'cpu'; it must be unset or cuda"),
        (["engine.speculative=suffix"], "engine.speculative is 'suffix'"),
        (["algorithm=ppo"], "algorithm.name is 'ppo'; it must be one without a section `critic`"),
        (["numerics.attention=flashinfer"], "numerics.attention is 'flashinfer'"),
        (["resume=true"], "resume is True"),
        (["output="], "output is ''; it must be the path of a file"),
        (["trainer.parallel.data=16"], "cluster.nodes is 1; it must be such that"),
        (["trainer.parallel.tensor=3"], "trainer.parallel.tensor is 3: "),
        (
            ["trainer.parallel.tensor=2", "cluster.gpus_per_node=3"],
            "trainer.parallel.tensor is 2; it must be a divisor of cluster.gpus_per_node = 3",
        ),
        (
            ["trainer.parallel.data=12", "cluster.nodes=2"],
            "cluster.gpus_per_node is 8; it must be a divisor of the 12 processes",
        ),
        (
            ["trainer.parallel.pipeline=3", "placement.transport=stages"],
            "trainer.parallel.pipeline is 3; it must divide the model's 2 layers",
        ),
        (["engine.kv_cache_tokens=64"], "engine.kv_cache_tokens is 64, whole pages of 64 tokens"),
        (["rollout.max_prompt_len=1000"], "rollout.max_prompt_len + rollout.max_new_tokens = 1256"),
        (["placement.transport=a:B"], "placement.transport is 'a:B'"),
        (["model.path=nowhere"], "model folder nowhere does not exist"),
        (["cluster.cards=h100"], "cluster.cards"),
    ],
)
def test_bad_input_is_named(tiny, capsys, words, said):
    assert main(["plan", f"model.path={tiny}", "trainer.micro_batch_tokens=4096", *words]) in (1, 2)
    assert said in capsys.readouterr().err


def test_the_command_prints_and_writes_the_plan(tiny, capsys, tmp_path):
    file = tmp_path / "plans" / "plan.json"
    words = ["plan", f"model.path={tiny}", "experiment=reverse_digits", f"output={file}"]
    assert main([*words, "algorithm=dr_grpo"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["fits"]
    for text in ("alias (the run's)", "trainer, without release", "It fits: ", "rollout"):
        assert text in printed
    assert main([*words, "cluster.gpu_gib=2"]) == 1  # it may be written again
    assert not json.loads(file.read_text())["fits"]
    file.write_text("mine")
    assert main(words) == 2
    assert "give another output" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_constants_are_those_of_the_results():
    """An installed package has no results; three digits, as the constants are written."""

    def rounded(values):
        return {
            key: rounded(value) if isinstance(value, dict) else float(f"{value:.3g}")
            for key, value in values.items()
        }

    assert rounded(dataclasses.asdict(from_results(RESULTS))) == dataclasses.asdict(CONSTANTS)
    assert CARDS["h200"].flops_s == PEAK_FLOPS["NVIDIA H200"]
    assert CARDS["h100"].flops_s == PEAK_FLOPS["NVIDIA H100 80GB HBM3"]


def test_against_the_measured_step(qwen3_1_7b):
    """docs/results/h200_step_qwen3_1.7b.json, of which no share was taken.

    The step within 15%, training too. Its rollout is planned 17% too short. The engine's files are
    of a later program: Qwen3-8B draws 64 x 8 samples at 22,194 tokens a second in them, and drew
    19,812 before (h200_engine_warm_start_qwen3_8b), which is 11%. The rest is the fit's own error.
    """
    report = json.loads((RESULTS / "h200_step_qwen3_1.7b.json").read_text())
    found = report["with release"]
    own = ("model.path", "output_dir", "run_name", "trainer.num_steps")
    words = [w for w in found["command"][2:] if w.split("=")[0] not in own]
    planned = plan_of(qwen3_1_7b, *words, "cluster.gpus_per_node=1", "cluster.card=h200")
    times = planned["times"]
    seconds = {
        "step": (found["step_s"], times["step_s"]),
        "train": (found["perf/train_s"], times["train_s"]),
    }
    tags = planned["memory"]["trainer"]
    sizes = {
        f"{phase} {tag}": (found[f"perf/{phase}_{tag}_gib"], tags[phase][tag] / GIB)
        for phase, tag in (
            ("rollout", "kv_cache"), ("rollout", "optimizer"), ("train", "gradients"),
        )
    } | {
        f"{phase} in all": (found[f"perf/{phase}_device_gib"], sum(tags[phase].values()) / GIB)
        for phase in ("rollout", "train")
    }  # fmt: skip
    whole = report["without"]["perf/train_device_gib"]
    sizes["without release"] = (whole, sum(tags["without_release"].values()) / GIB)
    ratios = pairs_of(seconds | sizes)
    assert all(0.85 <= ratio <= 1.15 for _, _, ratio in ratios.values()), ratios
    assert all(0.97 <= ratios[name][2] <= 1.03 for name in sizes), ratios
    assert planned["kv_tokens"] == found["kv_tokens"]
    assert 0.80 <= times["rollout_s"] / found["perf/rollout_s"] < 0.85


def test_against_the_engines_workloads():
    """What the shares were fitted to comes out again, each workload within 13%."""
    for name in ENGINE_FILES:
        report = json.loads((RESULTS / name).read_text())
        for text, found in report["variants"]["default"]["workloads"].items():
            prompts, samples, given, drawn = text.split("x")
            words = [f"rollout.prompts_per_step={prompts}", f"rollout.max_prompt_len={given}"]
            words += [f"rollout.samples_per_prompt={samples}", f"rollout.max_new_tokens={drawn}"]
            words += ["algorithm=reinforce_plus_plus", "trainer.micro_batch_tokens=16384"]
            folder = SHAPES / report["model"]
            run = resolve("plan", [f"model.path={folder}", *words, "engine.max_num_seqs=512"])
            model = load_model_config(folder)
            step = StepModel(run, model, Layout.of(run, model), measured())
            rate = int(prompts) * int(samples) * int(drawn) / step.rollout_s(1 << 20)
            assert 0.87 <= rate / found["output_tokens_s"]["median"] <= 1.15, (name, text, rate)


def test_against_two_gpus_trainer_and_transfer():
    """Tensor parallel steps, and bytes and seconds over NVLink, which no share was taken from."""
    report = json.loads((RESULTS / "h200x2_trainer_tp2_qwen3_8b.json").read_text())["packs"]
    found = report["8x1024"]
    words = [f"model.path={QWEN3_8B}", "rollout.prompts_per_step=8", "rollout.max_prompt_len=512"]
    words += ["rollout.samples_per_prompt=8", "rollout.max_new_tokens=512"]
    words += ["trainer.micro_batch_tokens=8192"]
    split = ["trainer.parallel.tensor=2", "trainer.parallel.sequence=true"]
    run, model = resolve("plan", [*words, *split]), load_model_config(QWEN3_8B)
    step = StepModel(run, model, Layout.of(run, model), measured())
    assert 0.9 <= step.train_s() / found["step_s"]["median"] <= 1.1
    tags = make_plan(run)["memory"]["trainer"]["train"]
    taken = sum(tags.values()) - tags["runtime"]  # torch's own count
    assert 0.9 <= taken / GIB / found["peak_memory_gib"] <= 1.1
    moved = json.loads((RESULTS / "h200x2_sync_qwen3_8b.json").read_text())["transports"]["nccl"]
    apart = [*words, "placement=process", "placement.transport=nccl"]
    planned = make_plan(resolve("plan", apart))["sync"][0]
    assert 0.9 <= planned["seconds"] / moved["update_s"]["median"] <= 1.1
    sent = json.loads((RESULTS / "h200x2_transfer_tp1_tp1.json").read_text())["ranks"][1]["bytes"]
    assert planned["held_bytes"] == planned["moved_bytes"] == sent


@pytest.mark.parametrize("gpus", [1, 8, 1024])
def test_more_gpus_take_less_time(gpus):
    """The same step on 1 to 1,024 GPUs; every GPU has a place of its own."""
    words = [f"cluster.nodes={max(1, gpus // 8)}", f"trainer.parallel.data={gpus}"]
    words += ["rollout.prompts_per_step=1024", "trainer.parallel.offload_optimizer=true"]
    found = plan_of(QWEN3_8B, *words)
    assert found["fits"]
    assert len({(p["node"], p["gpu"]) for p in found["placement"]}) == found["gpus"] == gpus
    one = plan_of(QWEN3_8B, words[2], words[3])["times"]
    assert gpus == 1 or found["times"]["step_s"] < one["step_s"]
    assert found["model"] == QWEN3_8B.name
