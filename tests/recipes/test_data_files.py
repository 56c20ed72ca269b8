"""Data sets as users have them: folders, saved Hugging Face sets, records of verl and of slime."""

import json
from dataclasses import replace
from datetime import datetime

import pyarrow
import pyarrow.parquet
import pytest

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.data.rewards import CHECKS
from samebit.recipes.data.tasks.base import DataConfig, SupervisedConfig
from samebit.recipes.data.tasks.registry import load_datasets


def records(*numbers):
    return [{"prompt": f"q{i}", "label": f"a{i}"} for i in numbers]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def arrow(path, rows, batch=2):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=batch)
    return path


WRITERS = {".jsonl": jsonl, ".parquet": parquet, ".arrow": arrow}


def saved_set(folder, *shards, **state):
    """As datasets.Dataset.save_to_disk writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        arrow(folder / name, rows)
    content = {"_data_files": [{"filename": name} for name in names], "_split": "train"} | state
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def problems(path, **settings):
    return list(load_datasets(DataConfig(path=str(path), eval_size=0, **settings))[0])


def read_by_preset(name, path, *words):
    """What is read of a file by a preset of configs/data; by words too."""
    config = resolve("grpo", ["model.path=m", f"data={name}", f"data.path={path}", *words]).data
    return list(load_datasets(replace(config, eval_size=0))[0])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_is_its_files_by_name(tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / ".hidden").write_text("")
    for name, numbers in (("b", [3, 4, 5]), ("a", [0, 1, 2]), ("c", [6])):
        WRITERS[kind](folder / f"{name}{kind}", records(*numbers))
    found = problems(folder)
    assert [(p.index, p.prompt, p.label) for p in found] == [
        (i, f"q{i}", f"a{i}") for i in range(7)
    ]
    place = "line 3" if kind == ".jsonl" else "row 2"
    assert found[5].where == f"{folder}/b{kind}, {place}"
    assert found == problems(jsonl(tmp_path / "one.jsonl", records(*range(7))))


def test_a_saved_set_is_what_its_state_lists(tmp_path):
    """Caches of a set's transformations lie beside its files."""
    folder = saved_set(tmp_path / "saved", records(0, 1, 2), records(3))
    arrow(folder / "cache-0123.arrow", records(8, 9))
    assert [p.prompt for p in problems(folder)] == ["q0", "q1", "q2", "q3"]


def test_a_pattern_is_the_files_that_it_fits(tmp_path):
    """Beside others, as a set from a hub is laid out."""
    names = [f"train-0000{i}-of-00002-0123456789abcde{i}.jsonl" for i in (1, 0)]
    folder = folder_of(tmp_path, *names, "test-00000-of-00001.jsonl", "README.md", ".train-x.jsonl")
    found = problems(folder / "train-*")
    assert [p.where.partition(",")[0] for p in found] == [str(folder / n) for n in sorted(names)]
    assert len(problems(folder / "te[s]t*")) == 1
    folder_of(tmp_path, "[x].jsonl")
    assert len(problems(folder / "[x].jsonl")) == 1, "a file that is there is no pattern"
    for pattern, fault in {
        "nothing-*": "folder/nothing-.* fits no file; give",
        "t*": "folder/t.* holds files of several splits, test-00000",
        "train-00000*": "lacks shard 1 of 2",
        "*": "holds README.md, which is no file of records",
    }.items():
        with pytest.raises((ValueError, OSError), match=fault):
            problems(folder / pattern)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_label_that_is_a_list_or_an_object_is_its_json_text(tmp_path, kind):
    """As in verl's files of search and of code; sft has nothing to train on there."""
    labels = [{"target": ["Zürich", "Zurich"]}, {"target": []}]
    rows = [{"prompt": f"q{i}", "reward_model": {"ground_truth": x}} for i, x in enumerate(labels)]
    path = WRITERS[kind](tmp_path / f"data{kind}", rows)
    found = problems(path, label_key="reward_model.ground_truth")
    assert [json.loads(p.label) for p in found] == labels
    assert found[0].label == '{"target": ["Zürich", "Zurich"]}'
    sft = SupervisedConfig(path=str(path), eval_size=0, label_key="reward_model.ground_truth")
    with pytest.raises(ValueError, match="'reward_model.ground_truth' is .*; give a text or a num"):
        load_datasets(sft)


def test_records_without_labels(tmp_path):
    """Where none is asked for; a reward that compares with one says so before the first step."""
    path = jsonl(tmp_path / "data.jsonl", [{"prompt": f"q{i}"} for i in range(3)])
    assert [p.label for p in problems(path, label_key=None)] == ["", "", ""]
    words = ["model.path=m", f"data.path={path}", "data.label_key=null"]
    assert resolve("grpo", words).data.label_key is None
    own = resolve("eagle3", words[:2]).data.of_prompts()
    assert [p.label for p in load_datasets(replace(own, eval_size=0))[0]] == ["", "", ""]
    with pytest.raises(ValueError, match="line 1 has no 'label'; its keys are"):
        problems(path)
    with pytest.raises(ValueError, match="its label is empty, and exact_match compares with it"):
        CHECKS["exact_match"](problems(path, label_key=None)[0])


def folder_of(tmp_path, *names):
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    for name in names:
        writer = WRITERS.get(f".{name.rpartition('.')[2]}", jsonl)
        writer(folder / name, records(1))
    return folder


FOLDERS = {
    (): "folder is an empty folder; give a .jsonl, .parquet or .arrow file, a folder of them, or",
    ("a.jsonl", "b.parquet"): "holds files of several kinds, a.jsonl, b.parquet; give one kind",
    ("a.jsonl", "README.md"): "holds README.md, which is no file of records",
    ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"): (
        "holds files of several splits, test-00000-of-00001.parquet, train-00000-of-00001.parquet;"
    ),
    (
        "train-00000-of-00001-0123456789abcdef.parquet",
        "val-00000-of-00001-fedcba9876543210.parquet",
    ): ("holds files of several splits, train-00000-of-00001-0123456789abcdef.parquet, val-00000"),
    ("train.parquet", "test.parquet"): (
        "several splits, test.parquet, train.parquet; give those of one: a file, or a pattern such"
    ),
    ("gsm8k_Train.jsonl", "gsm8k_test.jsonl"): "several splits, gsm8k_Train.jsonl, gsm8k_test.json",
    ("a-00000-of-00001.jsonl", "b-00000-of-00001.jsonl"): "holds shards of a, b; give those of one",
    ("train-00000-of-00002-0123456789abcdef.jsonl",): "lacks shard 1 of 2 of 'train'",
    ("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"): (
        "lacks shard 1 of 3 of 'train'; give all of one"
    ),
    ("train-00000-of-00001.jsonl", "train-00001-of-00002.jsonl"): (
        "holds shards of several sets of 2 of 'train'"
    ),
}


@pytest.mark.parametrize("names", FOLDERS, ids=str)
def test_an_ambiguous_folder_is_refused(tmp_path, names):
    folder = folder_of(tmp_path, *names)
    with pytest.raises((ValueError, OSError), match=FOLDERS[names]) as caught:
        problems(folder)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": []}, r"state.json: _data_files is \[\]; it must be a list of"),
        ({"_data_files": [{"filename": "x.arrow"}]}, "state.json lists x.arrow, no .arrow file"),
        ({"_indices_data_files": [{"filename": "i"}]}, "selects rows by _indices_data_files"),
    ],
)
def test_a_saved_set_that_cannot_be_read_is_refused(tmp_path, state, message):
    with pytest.raises((ValueError, OSError), match=message):
        problems(saved_set(tmp_path / "saved", records(0), **state))


def test_a_saved_dict_of_splits_asks_for_one(tmp_path):
    for name in ("train", "test"):
        saved_set(tmp_path / "sets" / name, records(0))
    (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="sets holds the splits test, train; give the folder of o"):
        problems(tmp_path / "sets")


def test_a_bad_row_of_a_folder_is_named(tmp_path):
    folder = folder_of(tmp_path, "a.arrow")
    arrow(folder / "b.arrow", [*records(1, 2), {"prompt": "q", "label": None}])
    with pytest.raises(ValueError, match=f"^{folder}/b.arrow, row 2: 'label' is None; give a text"):
        problems(folder)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda data: data[:-8], ": its end is missing"),  # all batches are there
        (lambda data: data[: len(data) // 2] + data[-8:], ": Expected to "),
        (lambda data: b"", ": its end is missing"),
        (lambda data: b"ARROW1" + data, ": it is in Arrow's file format; save it as a stream, or"),
    ],
)
def test_a_damaged_arrow_file_is_named(tmp_path, cut, message):
    path = arrow(tmp_path / "a.arrow", records(*range(6)))
    path.write_bytes(cut(path.read_bytes()))
    what = f"{path}(, record batch [0-2])? is not a readable file of Arrow's stream format"
    with pytest.raises(ValueError, match=f"^{what}{message}"):
        problems(path)


def test_records_of_verl_are_read_as_they_are(tmp_path):
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": f"{i}"},
            "extra_info": {"split": "train", "index": i, "answer": None},
        }
        for i in range(3)
    ]
    found = read_by_preset("verl", parquet(tmp_path / "train.parquet", rows))
    assert [p.prompt for p in found] == [row["prompt"] for row in rows]
    assert [p.label for p in found] == ["0", "1", "2"]
    extra = {"split": "train", "index": 2, "answer": None}
    assert found[2].metadata == {"data_source": "openai/gsm8k", "extra_info": extra}


CALC = {"type": "function", "function": {"name": "calc", "parameters": {"x": {"default": None}}}}
LOOK = {"type": "function", "function": {"name": "look", "strict": True}}
CHAT = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "calc", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "2"},
]


def test_records_of_slime_are_read_as_they_are(tmp_path):
    """Tools as a list, as the JSON text of one, and none; turns that call them; and by its own keys
    alone, where a text is what a user says."""
    rows = [{"prompt": f"{i}", "label": f"{i}"} for i in range(2)]
    plain = read_by_preset("slime", jsonl(tmp_path / "plain.jsonl", rows))
    assert [(p.prompt, p.label) for p in plain] == [("0", "0"), ("1", "1")]
    assert resolve("grpo", ["model.path=m", "data=slime", "data.path=d.jsonl"]).data.chat
    asked = [
        {"input": CHAT, "answer": 2, "metadata": {"rm_type": "math"}, "tools": tools}
        for tools in ([CALC, LOOK], json.dumps([CALC]), None, [])
    ]
    keys = ["prompt_key=input", "label_key=answer", "metadata_keys=[metadata]", "tools_key=tools"]
    words = [f"data.{key}" for key in keys]
    found = read_by_preset("slime", jsonl(tmp_path / "a.jsonl", asked), *words)
    assert [p.tools for p in found] == [[CALC, LOOK], [CALC], [], []]
    assert found[0].prompt == CHAT
    assert (found[0].label, found[0].metadata) == ("2", {"metadata": {"rm_type": "math"}})


def test_what_rows_of_columns_lack_is_no_part_of_them(tmp_path):
    """Each tool and message has every field of its column in a parquet file."""
    tool = {"function": {"name": "calc"}}
    path = parquet(tmp_path / "a.parquet", [{"prompt": CHAT, "label": "2", "tools": [tool, LOOK]}])
    [problem] = problems(path, tools_key="tools")
    assert problem.tools == [tool, LOOK]
    assert problem.prompt == CHAT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": 3}, "line 1: 'tools' is 3; give a list of objects such as"),
        ({"tools": "[{"}, "line 1: 'tools' is no JSON text: .*; give a list of tools"),
        ({"tools": [{}]}, r"line 1: 'tools' is \[{}\]; give a list of objects"),
        ({"tools": [{"name": "\ud800"}]}, r"line 1 holds the lone surrogate \\ud800"),
        ({"other": 1}, "line 1 has no 'tools'; its keys are"),
        (
            {"tools": [], "prompt": [{"role": "assistant", "tool_calls": "x"}]},
            "line 1: 'prompt': 'tool_calls' is 'x'; give a list of objects",
        ),
        ({"tools": [], "prompt": [{"role": "user", "tool_calls": []}]}, "give texts `role` and"),
    ],
)
def test_bad_tools_are_named(tmp_path, change, message):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "label": "a"} | change])
    with pytest.raises(ValueError, match=message):
        problems(path, tools_key="tools")


def test_pyarrow_is_asked_for_where_a_folder_needs_it(monkeypatch, capsys, tmp_path):
    import sys

    folder = folder_of(tmp_path, "a.arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    source = f"data.sources=[{{path: '{folder}'}}]"
    assert main(["grpo", "model.path=m", "logger=disabled", source, "dry_run=true"]) == 1
    assert "data, a .arrow file, needs the package pyarrow" in capsys.readouterr().err


def test_streams_behind_each_other_are_refused(tmp_path):
    """Their reader ends with the first: the rest would be lost."""
    file = arrow(tmp_path / "twice.arrow", records(0, 1))
    file.write_bytes(file.read_bytes() * 2)
    with pytest.raises(ValueError, match="twice.arrow.* holds more than one stream"):
        problems(file)


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    table = pyarrow.table([["q0"], ["a0"], ["b0"]], names=["prompt", "label", "label"])
    file = tmp_path / f"data{kind}"
    if kind == ".parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with (
            pyarrow.OSFile(str(file), "wb") as out,
            pyarrow.ipc.new_stream(out, table.schema) as to,
        ):
            to.write_table(table)
    with pytest.raises(ValueError, match="it has two columns 'label'"):
        problems(file)


def test_values_of_columns_that_no_json_holds_are_named(tmp_path):
    """A template would say of them what Python does."""
    called = {"function": {"name": "f", "arguments": {"at": datetime(2026, 1, 1)}}}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [called]}]
    file = parquet(tmp_path / "data.parquet", [{"prompt": chat, "label": "a"}])
    with pytest.raises(ValueError, match="row 0.*'tool_calls' holds datetime.*what JSON can hold"):
        problems(file)
