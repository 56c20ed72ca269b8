"""data.filter: a function of the user's says which records of files are used."""

import json
import logging

import pytest
from test_records import Data

from samebit.recipes.cli.compose import ConfigError, resolve
from samebit.recipes.cli.main import main
from samebit.recipes.data.tasks.base import DataConfig
from samebit.recipes.data.tasks.registry import load_datasets
from samebit.recipes.run.input_files import input_files

FILTERS = """
def even(problem):
    return int(problem.prompt) % problem.metadata.get("n", 2) == 0

def none(problem):
    return False

def fails(problem):
    return {"0": True}[problem.prompt]

def leaves(problem):
    return True if problem.prompt == "0" else exit(0)

def number(problem):
    return int(problem.prompt)

six = 6
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a module of filters, and the files a.jsonl and b.jsonl."""
    (tmp_path / "own_filters.py").write_text(FILTERS)
    monkeypatch.syspath_prepend(tmp_path)
    for name, numbers in {"a": range(10), "b": range(20, 26)}.items():
        rows = ({"prompt": f"{i}", "label": "1", "n": 2} for i in numbers)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    return tmp_path


def read(folder, name, **more):
    """Prompts and indices of both splits."""
    path = str(folder / "a.jsonl")
    splits = load_datasets(DataConfig(path=path, filter=f"own_filters:{name}", **more))
    assert [[p.index for p in split] for split in splits] == [[*range(len(x))] for x in splits]
    return [[p.prompt for p in split] for split in splits]


def test_records_are_left_out_before_any_is_held_out(own, caplog):
    """Of one file, of a file that is held out, and of each of several sources."""
    with caplog.at_level(logging.WARNING):
        assert read(own, "even", eval_size=2) == [["0", "2", "4"], ["6", "8"]]
    assert caplog.messages == [f"data.filter leaves 5 of 10 records of {own / 'a.jsonl'} out"]
    assert read(own, "even", metadata_keys=["n"], eval_path=str(own / "b.jsonl")) == [
        ["0", "2", "4", "6", "8"],
        ["20", "22", "24"],
    ]
    run = resolve(
        "grpo",
        [
            "model.path=m",
            f"data.sources=[{{path: {own}/a.jsonl}}, {{path: {own}/b.jsonl}}]",
            "data.eval_size=1",
            "data.filter=own_filters:even",
        ],
    )
    train, held_out = load_datasets(run.data)
    assert train.sizes == (4, 2)
    assert [p.prompt for p in (*train, *held_out)] == ["0", "2", "4", "6", "20", "22", "8", "24"]
    assert dict(input_files(run))["data.filter"] == own / "own_filters.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "data.filter 'own_filters:none' leaves 10 of 10 records of .*a.jsonl out; none"),
        ("fails", r"9 records .*a.jsonl, line 2: data.filter raised KeyError\('1'\); .*line 3: "),
        ("leaves", r"9 records .*a.jsonl, line 2: data.filter raised SystemExit\(0\); .*line 3: "),
        ("number", "a.jsonl, line 1: data.filter returned 0; give True, which keeps the record, o"),
        ("six", "data.filter is 'own_filters:six', a int; give a function"),
        ("seven", "data.filter is 'own_filters:seven', which cannot be imported: .*no attribute"),
    ],
)
def test_filters_that_cannot_be_used(own, name, message):
    with pytest.raises(ValueError, match=message):
        read(own, name, eval_size=0)


def test_a_dry_run_asks_it(own, demo_model, capsys):
    data = Data(demo_model, own)
    data.path = own / "a.jsonl"
    for name, code in (("even", 0), ("none", 1)):
        words = data.arguments("sft", f"data.filter=own_filters:{name}", "eval_every=20")
        assert main(["sft", *words, "dry_run=true"]) == code
    captured = capsys.readouterr()
    assert "train_records                5\n" in captured.out
    assert "leaves 10 of 10 records" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.filter=even"], "data.filter is 'even'; it must be module:function, or unset"),
        (
            ["data.filter=own_filters:even", "data.task=reverse_digits"],
            "data.filter is 'own_filters:even'; .*nothing reads it where data.task is 'reverse_dig",
        ),
    ],
)
def test_what_is_no_filter_of_files(words, message):
    with pytest.raises(ConfigError, match=message):
        resolve("grpo", ["model.path=m", *words])
