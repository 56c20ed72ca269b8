"""samebit plan: placement, memory and updates, by hand where a hand can count."""

import json
import math

import pytest
from megatron.core.parallel_state import RankGenerator
from plans import ELEMENTS, GIB, KV, LAYER, PADDED, D, F, V, plan_of, write_tiny

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.plan import make_plan, summary
from samebit.recipes.planning.layout import Layout
from samebit.recipes.planning.measured import measured
from samebit.recipes.planning.sync import pipeline_plan
from samebit.rollout.models.registry import load_model_config

TENSOR = ["trainer.parallel.tensor=2", "numerics.tp_invariant=true"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("plan") / "tiny")


def test_memory_by_tag_of_a_tiny_model(tiny):
    """bf16 weights, fp32 gradients, masters and two moments; 4 samples of 128 tokens, in pages."""
    words = ["engine.max_num_seqs=4", "rollout.max_prompt_len=100", "rollout.max_new_tokens=28"]
    found = plan_of(tiny, *words)["memory"]["trainer"]
    graphs = int(measured().rollout.graph_bytes_per_logit_byte * 4 * V * 4)
    fixed = {"runtime": 2 * GIB, "weights": 2 * ELEMENTS, "optimizer": 12 * ELEMENTS}
    fixed |= {"reference": 0, "served_weights": 0, "delta_base": 0}
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
    kl = ["algorithm=grpo_kl", "trainer.parallel.offload_reference=true"]
    assert plan_of(tiny, *kl)["memory"]["trainer"]["train"]["reference"] == 0


@pytest.mark.parametrize(
    ("transport", "words"),
    [
        ("alias", []),
        ("alias", ["trainer.parallel.tensor=2", "trainer.parallel.data=2"]),
        ("stages", ["trainer.parallel.pipeline=2", "trainer.parallel.tensor=2"]),
        ("nccl", ["placement=process"]),
        ("nccl", ["placement=process", "trainer.parallel.pipeline=2", *TENSOR]),
    ],
)
def test_sync_bytes_are_what_receivers_hold(tiny, transport, words):
    words = [f"model.path={tiny}", f"placement.transport={transport}", *words]
    run, model = resolve("plan", words), load_model_config(tiny)
    layout = Layout.of(run, model)
    tensor = 1 if transport == "nccl" else run.trainer.parallel.tensor  # of an engine
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
    expected = {"engine": 0, "tensor": 0, "node": 0, "gpu": 1, "trains": False}
    assert apart["placement"][1] == expected
    assert list(apart["memory"]) == ["trainer", "engine"]
    together = plan_of(tiny, "placement=process", "placement.transport=ipc")["memory"]
    found = together["trainer"]["without_release"]  # two processes, each with its weights
    assert (found["runtime"], found["weights"]) == (4 * GIB, 4 * ELEMENTS)


def test_engines_apart_are_behind_all_trainers(tiny):
    """Two train and three draw: what each engine gets comes from both."""
    own = ["placement=process", "placement.transport=nccl"]
    words = [*own, "trainer.parallel.data=2", "placement.replicas=3"]
    found, alone = plan_of(tiny, *words), plan_of(tiny, *own)
    assert [found[key] for key in ("gpus", "engines")] == [5, 3]
    places = [(p["gpu"], p["trains"], p.get("engine")) for p in found["placement"]]
    engines = [(2 + i, False, i) for i in range(3)]
    assert places == [(0, True, None), (1, True, None), *engines]
    sync, of_one = found["sync"][0], alone["sync"][0]
    assert sync["held_bytes"] == of_one["held_bytes"]
    assert sync["all_bytes"] == 3 * of_one["all_bytes"]
    assert of_one["seconds"] < sync["seconds"] < 2 * of_one["seconds"]
    with pytest.raises(ValueError, match="gpus_per_node is 4; it must be at least 5 with"):
        plan_of(tiny, *words, "cluster.gpus_per_node=4", "cluster.nodes=2")
    with pytest.raises(ValueError, match="placement.transport is 'gloo'; it must be nccl with"):
        plan_of(tiny, *words, "placement.transport=gloo")


def test_engines_apart_of_several_gpus(tiny):
    """Each GPU has its part of every layer, and is sent that alone, by whoever holds it."""
    own = ["placement=process", "placement.transport=nccl", "numerics.tp_invariant=true"]
    words = [*own, "placement.replicas=2", "placement.engine_tensor=2"]
    found, alone = plan_of(tiny, *words), plan_of(tiny, *own)
    assert [found[key] for key in ("gpus", "engines")] == [5, 2]
    places = [(p["gpu"], p["engine"], p["tensor"]) for p in found["placement"] if not p["trains"]]
    assert places == [(1, 0, 0), (2, 0, 1), (3, 1, 0), (4, 1, 1)]
    memory = [plan["memory"]["engine"]["without_release"] for plan in (found, alone)]
    weights, whole = (each["weights"] for each in memory)
    assert 2 * weights > whole > weights
    sync, of_one = found["sync"][0], alone["sync"][0]
    assert sync["held_bytes"] == weights
    assert sync["all_bytes"] == 4 * weights
    assert of_one["seconds"] < sync["seconds"] < 4 * of_one["seconds"]
    beside_two = plan_of(tiny, *words, *TENSOR)
    assert beside_two["gpus"] == 6
    assert beside_two["sync"][0]["held_bytes"] == weights
    with pytest.raises(ValueError, match="must be nccl with placement.engine_tensor"):
        plan_of(tiny, *own, "placement.engine_tensor=2", "placement.transport=gloo")
    with pytest.raises(ValueError, match="engine_tensor is 8: .* does not divide by"):
        plan_of(tiny, *own, "placement.engine_tensor=8", "cluster.gpus_per_node=9")


def test_an_engine_apart_is_whole_beside_tensor_parallel_trainers(tiny):
    """It takes the memory and the time that it takes beside one."""
    own = ["placement=process", "placement.transport=nccl"]
    found, alone = (plan_of(tiny, *own, *words) for words in (TENSOR, []))
    assert (found["gpus"], found["engines"]) == (3, 1)
    assert found["memory"]["engine"] == alone["memory"]["engine"]
    assert found["times"]["rollout_s"] == alone["times"]["rollout_s"]
    assert found["sync"][0] == alone["sync"][0]
    assert found["memory"]["trainer"] != alone["memory"]["trainer"]
    assert plan_of(tiny, *own, *TENSOR, "cluster.gpus_per_node=3")["times"] == found["times"]
    with pytest.raises(ValueError, match="=2 unless numerics.tp_invariant=true: another number"):
        plan_of(tiny, *own, *TENSOR[:1])


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


def test_activations_by_layout(tiny):
    """Fewer of them with sequence parallel, context parallel and recomputation; a stage holds as
    many micro-batches as there are stages from it on."""

    def kept(*words):
        memory = plan_of(tiny, *words)["memory"]
        return [phases["train"]["activations"] for phases in memory.values()]

    factor, tensor = (
        measured().training.activation_bytes_per_product_byte,
        "trainer.parallel.tensor=2",
    )
    whole, rest = 4 * D, 2 * KV + 4 * 16 + 4 * 16 + 2 * F + F  # widths that tensor ranks split
    assert kept() == [math.ceil(factor * 8192 * 2 * 2 * (whole + rest))]
    assert kept(tensor) == [math.ceil(factor * 8192 * 2 * 2 * (whole + rest / 2))]
    assert kept(tensor, "trainer.parallel.sequence=true") == [math.ceil(kept()[0] / 2)]
    assert kept("trainer.parallel.context=2") == [math.ceil(kept()[0] / 2)]
    [selective] = kept("trainer.parallel.recompute=selective")
    again = whole + rest  # one layer at a time
    assert selective == math.ceil(factor * 8192 * 2 * (2 * (whole + rest - 3 * F) + again))
    [full] = kept("trainer.parallel.recompute=full")
    assert full == math.ceil(factor * 8192 * 2 * (2 * D + again))
    stages = ["trainer.parallel.pipeline=2", "placement.transport=stages"]
    assert kept(*stages) == [kept()[0], math.ceil(kept()[0] / 2)]


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
