"""Resume is bound to contents, not to paths, and a refusal names keys with both values."""

import importlib.metadata
import json
import shutil
from dataclasses import replace

import pytest
from helpers import edit_config
from run_children import open_run

from samebit.recipes.cli.compose import resolve
from samebit.recipes.data.tasks.base import DataConfig, Problem
from samebit.recipes.run import binding
from samebit.trainer.checkpoint import MANIFEST, CheckpointError, latest_checkpoint, manifest_text

RECORDS = [{"prompt": f"{i:02d}=", "label": f"{i:02d}"[::-1], "level": i % 3} for i in range(12)]
DATA = [
    "data.task=file",
    "data.eval_size=2",
    "data.metadata_keys=[level]",
    "reward.name=exact_match",
]


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Bound:
    """A run of one step on its own model and data, whose files a test may change."""

    def __init__(self, runs, folder):
        self.runs, self.model, self.data = runs, folder / "model", folder / "data.jsonl"
        shutil.copytree(runs.model, self.model)
        write_records(self.data, RECORDS)

    def resolve(self, *overrides):
        given = [a for a in self.runs.arguments("run") if not a.startswith(("data", "reward"))]
        files = [f"model.path={self.model}", f"data.path={self.data}", "trainer.num_steps=1"]
        return resolve("grpo", [*given, *DATA, *files, *overrides])

    def resume(self, *overrides):
        with open_run(self.resolve("resume=true", *overrides)) as session:
            return session.resumed.step


@pytest.fixture(scope="module")
def trained(make_runs, tmp_path_factory):
    """One such run. Do not write to its folders."""
    from samebit.recipes import grpo

    folder = tmp_path_factory.mktemp("bound")
    bound = Bound(make_runs(folder), folder)
    grpo.train(bound.resolve())
    return folder


@pytest.fixture
def bound(make_runs, trained, tmp_path):
    """A copy that stands elsewhere: every path is another one."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return Bound(make_runs(tmp_path), tmp_path)


def test_moved_and_renamed_files_are_no_difference(bound, tmp_path):
    assert bound.resume() == 1
    bound.model = bound.model.rename(tmp_path / "renamed")
    bound.data = bound.data.rename(tmp_path / "renamed.jsonl")
    assert bound.resume() == 1


def change(index, **fields):
    return lambda records: records[index].update(fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(0, prompt="99="), "content of training records 10 x "),
        (change(3, label="00"), "content of training records 10 x "),
        (change(5, level=7), "content of training records 10 x "),
        (lambda records: records.reverse(), "content of training records 10 x "),
        (
            lambda records: records.insert(0, RECORDS[0] | {"prompt": "98="}),
            "content of training records 10 x ",
        ),
        (change(11, label="00"), "content of held-out records 2 x "),
    ],
)
def test_other_data_are_refused(bound, edit, message):
    """One field of one record, or their order."""
    records = [dict(record) for record in RECORDS]
    edit(records)
    write_records(bound.data, records)
    with pytest.raises(CheckpointError, match=rf"another data or tokenizer: {message}\w+ there, "):
        bound.resume()


def test_keys_that_the_run_does_not_read_are_free(bound):
    """Contents are what the run sees of a record."""
    write_records(bound.data, [record | {"comment": "x"} for record in RECORDS])
    assert bound.resume() == 1


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_another_tokenizer_is_refused(bound, file):
    path = bound.model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"x": 1} if "conf" in file else {}))
    if "conf" not in file:  # another order of the same vocabulary
        shutil.copy(bound.runs.model / file, path)
        path.write_text(path.read_text().replace('"1": 2', '"1": 3').replace('"2": 3', '"2": 2'))
    with pytest.raises(CheckpointError, match=rf"content of model.path/{file} \w{{16}} there, \w"):
        bound.resume()


def test_a_chat_template_that_appears_is_refused(bound):
    (bound.model / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(CheckpointError, match="model.path/chat_template.jinja absent there, "):
        bound.resume()


def test_every_key_is_named_with_both_values(bound):
    edit_config(bound.model, rms_norm_eps=1e-3)
    with pytest.raises(CheckpointError) as error:
        bound.resume("trainer.optimizer.lr=0.02", "seed=4")
    text = str(error.value)
    assert "step_00000001 was written under another configuration: " in text
    assert "seed 0 there, 4 here" in text
    assert "trainer.optimizer.lr 0.01 there, 0.02 here" in text
    assert "another model configuration" not in text.split("; ")[0]
    assert "model configuration: config.json: norm_eps 1e-06 there, 0.001 here" in text


def test_an_edited_reward_is_told_and_goes_on(bound, capsys, monkeypatch, tmp_path):
    """To mend a reward and go on is what resume is for."""
    source = tmp_path / "graded_here.py"
    source.write_text("def grade(text, problem):\n    return float(len(text))\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = "reward.name=graded_here:grade"
    manifest = latest_checkpoint(bound.runs.folder / "run" / "checkpoints")
    content = {k: v for k, v in manifest.manifest.items() if k != "digest"}
    content |= {"reward_source": binding.digest(source.read_bytes())}
    content["config"]["reward.name"] = "graded_here:grade"
    (manifest.path / MANIFEST).write_text(manifest_text(content))
    assert bound.resume(reward) == 1
    assert "reward" not in capsys.readouterr().err
    source.write_text(source.read_text() + "# mended\n")
    assert bound.resume(reward) == 1
    assert "the source of reward.name has changed since" in capsys.readouterr().err


def test_another_card_of_the_profile_is_told(bound, capsys, monkeypatch):
    """An H100 and an H200 have equal log-probs; cuBLAS chooses other products backward."""
    assert binding.card_of(bound.resolve()) is None
    checkpoint = latest_checkpoint(bound.runs.folder / "run" / "checkpoints")
    content = {k: v for k, v in checkpoint.manifest.items() if k != "digest"}
    (checkpoint.path / MANIFEST).write_text(manifest_text(content | {"card": "NVIDIA H200"}))
    for card, told in (("NVIDIA H200", False), ("NVIDIA H100 80GB HBM3", True)):
        monkeypatch.setattr(binding, "card_of", lambda _run, card=card: card)
        assert bound.resume() == 1
        said = "was written on an NVIDIA H200; this is an NVIDIA H100 80GB HBM3: log-probs"
        assert (said in capsys.readouterr().err) is told


def test_what_the_architecture_implies_is_no_difference(bound):
    """Manifests once had a key for it."""
    checkpoint = latest_checkpoint(bound.runs.folder / "run" / "checkpoints")
    content = {k: v for k, v in checkpoint.manifest.items() if k != "digest"}
    assert "qk_norm" not in content["model"]
    content["model"]["qk_norm"] = True
    (checkpoint.path / MANIFEST).write_text(manifest_text(content))
    assert bound.resume() == 1


def test_a_manifest_that_names_no_algorithm_is_grpos(bound):
    """Manifests were written before there were others."""
    checkpoint = latest_checkpoint(bound.runs.folder / "run" / "checkpoints")
    content = {k: v for k, v in checkpoint.manifest.items() if k != "digest"}
    assert content["config"].pop("algorithm.name") == "grpo"
    later = (
        "algorithm.kl_in",
        "algorithm.tis_clip",
        "trainer.loss_mean_tokens",
        "data.tools_key",
        "data.filter",
    )
    for key in later:
        del content["config"][key]
    assert content.pop("algorithm_source") is None
    (checkpoint.path / MANIFEST).write_text(manifest_text(content))
    assert bound.resume() == 1


def test_an_earlier_format_is_named(bound):
    """It had digests of paths."""
    checkpoint = latest_checkpoint(bound.runs.folder / "run" / "checkpoints")
    content = {k: v for k, v in checkpoint.manifest.items() if k not in ("digest", "format")}
    (checkpoint.path / MANIFEST).write_text(manifest_text(content))
    with pytest.raises(CheckpointError, match=r"has the format 1 of another version.* format 2"):
        bound.resume()


def test_records_are_told_apart():
    """Type and place of every field count; what JSON cannot say as well."""

    def digest(*problems):
        rows = [
            Problem(index=i, prompt=p, label=label, metadata=metadata)
            for i, (p, label, metadata) in enumerate(problems)
        ]
        return binding.records_digest(rows, DataConfig())

    variants = [
        digest(("a", "b", {})),
        digest(("ab", "", {})),
        digest(("a", "b", {"x": 1})),
        digest(("a", "b", {"x": "1"})),
        digest(("a", "b", {"x": {1}})),
        digest(("a\ud800", "b", {})),
        digest(("a", "b", {}), ("a", "b", {})),
        digest(([{"role": "user", "content": "a"}], "b", {})),
    ]
    assert len(set(variants)) == len(variants)
    assert digest(("a", "b", {"x": 1, "y": 2})) == digest(("a", "b", {"y": 2, "x": 1}))


def test_tools_are_part_of_a_records_digest():
    """Their keys in order, as templates write them; without tools it is what it was."""
    plain = Problem(index=0, prompt="a", label="b", metadata={"x": 1})
    told = [replace(plain, tools=[tool]) for tool in ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
    calls = [
        replace(plain, prompt=[{"role": "assistant", "tool_calls": problem.tools}])
        for problem in told
    ]
    digests = [binding.records_digest([p], DataConfig()) for p in (plain, *told, *calls)]
    assert len(set(digests)) == 5
    assert digests[0] == f"1 x {binding.digest(b'["a", "b", {"x": 1}]')}"


def test_every_record_of_a_file_counts_and_the_first_of_generated_ones():
    """Generated problems follow from their arguments, but a task may change between versions. A
    list of the user's task may have been read from anywhere; of a dataset that makes them on
    demand some are read, from all over it."""

    def digest(task, count, changed=None, kind=list):
        rows = [
            Problem(index=i, prompt="p", label="x" if i == changed else "l", metadata={})
            for i in range(count)
        ]
        return binding.records_digest(kind(rows), replace(DataConfig(), task=task))

    assert digest("file", 40) != digest("file", 40, changed=39)
    assert digest("reverse_digits", 40) != digest("reverse_digits", 40, changed=15)
    assert digest("reverse_digits", 40) == digest("reverse_digits", 40, changed=39)
    assert digest("reverse_digits", 40) != digest("reverse_digits", 41)
    assert digest("mine:listed", 40) != digest("mine:listed", 40, changed=39)
    made = [digest("mine:Made", 5000, at, tuple) for at in (None, 0, 4000, 4996, 4997)]
    assert len(set(made)) == 4  # every fourth is read
    assert made[0] == made[-1]


def test_the_package_that_makes_the_problems_counts(demo_model):
    """Another version of it may make others, of which the first ones look alike."""
    words = [f"model.path={demo_model}", "trainer.batch_size=4", "data=chain_sum"]
    contents = binding.bindings(resolve("sft", words), "sft", {})["contents"]
    assert contents["package reasoning_gym"] == importlib.metadata.version("reasoning_gym")
    words[-1] = "data=reverse_digits"
    assert (
        "package reasoning_gym"
        not in binding.bindings(resolve("sft", words), "sft", {})["contents"]
    )


def test_a_dry_run_refuses_what_the_resumed_run_would(bound, tmp_path):
    from samebit.recipes.cli.dry_run import describe_grpo

    assert describe_grpo(bound.resolve("resume=true", "dry_run=true"))["train_records"] == 10
    write_records(bound.data, [*RECORDS[:3], {**RECORDS[3], "label": "99"}, *RECORDS[4:]])
    with pytest.raises(CheckpointError, match="data or tokenizer: content of training records 10"):
        describe_grpo(bound.resolve("resume=true", "dry_run=true"))
