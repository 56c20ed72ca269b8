"""Several sources mixed by weights: the order, its binding, and what a dry run says of it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from samebit.recipes import sft
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.dry_run import describe_grpo, describe_sft
from samebit.recipes.config import ConfigError
from samebit.recipes.data.order import mixed_index
from samebit.recipes.data.tasks.base import DataConfig, DataSource
from samebit.recipes.data.tasks.registry import load_datasets
from samebit.recipes.run.binding import bindings
from samebit.recipes.run.input_files import input_files
from samebit.recipes.run.inputs import SftInputs

SIZES, WEIGHTS = (5, 1, 40), (1.0, 0.5, 2.5)
PINNED = [
    (1, 0),
    (0, 3),
    (2, 13),
    (0, 2),
    (2, 18),
    (2, 35),
    (2, 22),
    (2, 26),
    (2, 25),
    (0, 0),
    (2, 39),
    (0, 1),
]
PINNED_LATE = [(2, 38), (1, 0), (2, 18), (0, 4)]
PINNED_SEED = [(2, 0), (0, 4), (2, 11), (2, 22), (2, 18), (2, 7)]


def turns(count, first=0, sizes=SIZES, weights=WEIGHTS, seed=3):
    return [mixed_index(i, sizes, weights, seed) for i in range(first, first + count)]


def test_the_order_is_pinned():
    """A changed one would make every old run unrepeatable without a word."""
    assert turns(12) == PINNED
    assert turns(4, first=99_999) == PINNED_LATE
    assert turns(6, seed=4) == PINNED_SEED


def test_each_source_is_passed_through_whole():
    """Epoch after epoch, each in its own order, by itself: no record twice before all were once."""
    found = turns(4000)
    orders = set()
    for source, size in enumerate(SIZES):
        drawn = [record for where, record in found if where == source]
        epochs = [tuple(drawn[i : i + size]) for i in range(0, len(drawn) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert size == 1 or len(set(epochs)) > len(epochs) / 2
        orders |= {epoch for epoch in epochs if size == 40}
    assert len(orders) > 50


def test_sources_of_one_size_have_orders_of_their_own():
    found = turns(200, sizes=(30, 30), weights=(1.0, 1.0))
    first, second = ([r for where, r in found if where == s][:30] for s in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_shares_are_the_weights():
    """Within 4 standard deviations, which a right order keeps in all but 1 of 16,000 seeds."""
    count, total = 20_000, sum(WEIGHTS)
    drawn = Counter(source for source, _ in turns(count))
    for source, weight in enumerate(WEIGHTS):
        share = weight / total
        assert abs(drawn[source] - count * share) < 4 * (count * share * (1 - share)) ** 0.5


def test_a_place_depends_on_nothing_before_it():
    """A resumed run starts in the middle, and scaled weights are the same weights."""
    from samebit.recipes.data import order

    whole = turns(9000)
    order._draws.cache_clear()
    order._epoch.cache_clear()
    assert turns(1000, first=8000, weights=(2.0, 1.0, 5.0)) == whole[8000:]
    assert [mixed_index(i, SIZES, WEIGHTS, 3) for i in (4095, 17, 4096)] == [
        whole[i] for i in (4095, 17, 4096)
    ]


class Mix:
    """Two files of records that are mixed."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        self.write("a", range(10, 16))
        self.write("b", range(20, 29))

    def write(self, name, numbers):
        rows = [{"prompt": f"{i}=", "label": f"{i}", "level": i} for i in numbers]
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sources(self, weight=3, names="ab"):
        a, b = (self.folder / f"{name}.jsonl" for name in names)
        return f"[{{path: '{a}', weight: {weight}}}, {{path: '{b}'}}]"

    def resolve(self, command, *more, **sources):
        common = [f"model.path={self.model}", "device=cpu", "data.eval_size=2", "logger=disabled"]
        common.append(f"data.sources={self.sources(**sources)}")
        if command == "sft":
            common += ["trainer.batch_size=8", "trainer.num_steps=3"]
        else:
            common += ["rollout.max_prompt_len=6", "rollout.max_new_tokens=6"]
        return resolve(command, [*common, *more])

    def contents(self, **sources):
        run = self.resolve("sft", **sources)
        return bindings(run, "sft", SftInputs(run).records)


@pytest.fixture
def mix(demo_model, tmp_path):
    return Mix(demo_model, tmp_path)


def test_each_source_holds_out_its_last_records(mix):
    config = mix.resolve("grpo").data
    train, held_out = load_datasets(config)
    assert [p.prompt for p in train] == [f"{i}=" for i in (*range(10, 14), *range(20, 27))]
    assert [p.prompt for p in held_out] == ["14=", "15=", "27=", "28="]
    assert [p.index for p in (*train, *held_out)] == [*range(11), *range(4)]


def test_no_source_trains_on_what_another_holds_out(mix, caplog):
    mix.write("b", [*range(20, 24), 15, 24, 11])
    train, _ = load_datasets(mix.resolve("grpo").data)
    assert [p.prompt for p in train] == [f"{i}=" for i in (10, 12, 13, *range(20, 24))]
    for i, name in enumerate("ab"):
        what = f"1 records of data.sources.{i}.path {mix.folder}/{name}.jsonl are held out too"
        assert what in caplog.text


def test_sources_have_keys_of_their_own(mix):
    sources = [
        DataSource(path=f"{mix.folder}/a.jsonl", label_key="level", eval_size=1),
        DataSource(path=f"{mix.folder}/b.jsonl", eval_path=f"{mix.folder}/c.jsonl"),
    ]
    mix.write("a", [10, 11, 12])
    mix.write("c", [31, 32])
    sources[1].metadata_keys = []
    train, held_out = load_datasets(DataConfig(sources=sources, metadata_keys=["level"]))
    assert (train.sizes, held_out.sizes) == ((2, 9), (1, 2))
    assert (train[1].label, train[1].metadata) == ("11", {"level": 11})
    assert (held_out[2].prompt, held_out[2].metadata) == ("32=", {})


def test_a_step_has_the_samples_whose_turn_it_is(mix):
    """All of a run goes by the order, and a later step by its number alone."""
    run = mix.resolve("sft", "seed=7")
    inputs = SftInputs(run)
    prompts = [
        "".join("?0123456789="[i] for i in sample.token_ids[:3])
        for sample in sft.samples_of_step(run, 2, inputs.train_set)
    ]
    starts, sizes = (10, 20), (4, 7)
    found = [mixed_index(i, sizes, (3.0, 1.0), 7) for i in range(16, 24)]
    assert prompts == [f"{starts[source] + record}=" for source, record in found]


def test_a_resumed_run_goes_on_in_the_same_order(mix):
    """Of the order nothing is saved: the step says where it goes on."""
    names = ["trainer.optimizer.lr=0.01", f"output_dir={mix.folder}"]
    digests = [
        sft.train(mix.resolve("sft", *names, f"run_name={name}", *more))["weights_digest"]
        for name, *more in (
            ("whole", "trainer.num_steps=4"),
            ("parts", "trainer.num_steps=2"),
            ("parts", "trainer.num_steps=4", "resume=true"),
            ("other", "trainer.num_steps=4", "data.sources=" + mix.sources(weight=1)),
        )
    ]
    assert digests[0] == digests[2]
    assert len(set(digests)) == 3


def test_dropped_records_are_no_part_of_a_source(mix):
    mix.write("a", [10, 11111, 12, 13, 14, 15])
    run = mix.resolve("sft", "trainer.micro_batch_tokens=7", "data.overlong_prompts=drop")
    figures = describe_sft(run)
    assert (figures["train_records"], figures["train_records_dropped"]) == (10, 1)
    assert [figures[f"train_records_of_source_{i}"] for i in (0, 1)] == [3, 7]
    mix.write("a", [11111, 11112, 11113, 11114, 14, 15])
    with pytest.raises(ValueError, match="no record of data.sources.0 is left in the train split"):
        SftInputs(run)


def test_a_dry_run_counts_each_source(mix):
    figures = describe_grpo(mix.resolve("grpo"))
    names = [f"{split}_records{x}" for split in ("train", "held_out") for x in COUNTED]
    assert [figures[name] for name in names] == [11, 4, 7, 4, 2, 2]


COUNTED = ("", "_of_source_0", "_of_source_1")


def test_a_checkpoint_is_bound_to_weights_and_contents_of_sources(mix):
    base = mix.contents()
    (mix.folder / "a.jsonl").rename(mix.folder / "c.jsonl")
    assert mix.contents(names="cb") == base
    assert mix.contents(names="cb", weight=2)["config"]["data.sources.0.weight"] == 2.0
    assert not [key for key in base["config"] if key.endswith("path")]
    mix.write("b", range(21, 30))
    changed = mix.contents(names="cb")["contents"]
    different = [key for key, value in base["contents"].items() if changed[key] != value]
    assert different == [f"{x} records of data.sources.1" for x in ("training", "held-out")]


def test_what_a_run_reads_is_known(mix):
    found = dict(input_files(mix.resolve("grpo")))
    assert found["data.sources.1.path"] == mix.folder / "b.jsonl"
    linked = mix.folder / "linked"
    linked.mkdir()
    (linked / "a.jsonl").symlink_to(mix.folder / "b.jsonl")
    run = mix.resolve("grpo", f"data.sources=[{{path: '{linked}', eval_path: x.jsonl}}]")
    keys = ("data.sources.0.path", "data.sources.0.eval_path")
    assert [file for key, file in input_files(run) if key in keys] == [
        linked,
        linked / "a.jsonl",
        Path("x.jsonl"),
    ]


BAD = {
    "data.sources=[{pth: a}]": r"unknown key: data.sources.0.pth. Did you mean: data.sources.0.p",
    "data.sources=[{path: 1.10}]": "data.sources.0.path is 1.1, no text: quote it",
    "data.sources=[a]": "data.sources is .*; it must be a list of sections, such as",
    "data.sources=[{weight: 2}]": r"required: data.sources\[0\].path=...",
    "data.sources=[{path: a, weight: x}]": "data.sources: .*'x'.*; it must be a list of sections",
    "data.sources=[{path: a, weight: 0}]": "data.sources.0.weight is 0.0; it must be positive",
    "data.sources=[{path: a}, {path: b}, {path: a, weight: 3}]": (
        "data.sources.2 is data.sources.0 again; give one of weight 4"
    ),
    "data.sources=[{path: a, weight: nan}]": "data.sources.0.weight is nan; it must be positive",
    "data.sources=[{path: a, eval_size: -1}]": "data.sources.0.eval_size is -1; it must be 0 or m",
    "data.sources=[{path: a, eval_path: b, eval_size: 1}]": "sources.0.eval_size is 1; .* data",
}


@pytest.mark.parametrize("word", BAD)
def test_bad_sources_are_named(word):
    with pytest.raises(ConfigError, match=BAD[word]):
        resolve("grpo", ["model.path=m", word])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("data.path=x.jsonl", "data.path is 'x.jsonl'; it must be None, .* data.sources is given"),
        ("data.task=reverse_digits", "data.sources is .* nothing reads it where data.task is"),
        ("data.size=4", "data.size is 4; .* data.sources is given"),
    ],
)
def test_contradictions_are_named(more, message):
    with pytest.raises(ConfigError, match=message):
        resolve("grpo", ["model.path=m", "data.sources=[{path: a.jsonl}]", more])


def test_a_held_out_file_for_all(mix):
    mix.write("c", [10, 20, 77])
    more = f"data.eval_path={mix.folder}/c.jsonl"
    train, held_out = load_datasets(mix.resolve("grpo", more).data)
    assert (train.sizes, [p.prompt for p in held_out]) == ((5, 8), ["10=", "20=", "77="])
    with pytest.raises(ConfigError, match="data.sources.0.eval_size is 1; .* data.eval_path is gi"):
        mix.resolve("grpo", more, "data.sources=[{path: a, eval_size: 1}]")


def test_too_few_records_of_a_source(mix):
    mix.write("a", [1, 2])
    with pytest.raises(ValueError, match="data.sources.0.eval_size is 2 and .*a.jsonl has 2 rec"):
        load_datasets(mix.resolve("grpo").data)


def test_no_source_holds_out(mix):
    """GRPO and draft training measure on held-out prompts: of some source, whatever data says."""
    none = "data.sources=[{path: a.jsonl, eval_size: 0}, {path: b.jsonl, eval_size: 0}]"
    one = "data.sources=[{path: a.jsonl, eval_size: 0}, {path: b.jsonl, eval_size: 2}]"
    for command in ("grpo", "eagle3"):
        with pytest.raises(ConfigError, match="data.eval_size"):
            resolve(command, ["model.path=m", none])
        resolve(command, ["model.path=m", one, "data.eval_size=0"])
