"""Tasks: what they give, that splits share nothing, and that only the index matters."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from samebit.recipes.data.tasks.base import DataConfig
from samebit.recipes.data.tasks.registry import load_datasets

GENERATED = [
    DataConfig(task="reverse_digits", size=60, eval_size=12, args={"length": 3}),
    DataConfig(task="reasoning_gym/chain_sum", size=60, eval_size=12, args={"max_terms": 2}),
    # Draws from the global generator of `random`.
    DataConfig(task="reasoning_gym/list_functions", size=60, eval_size=12),
    # Seeds the global generator of numpy.
    DataConfig(task="reasoning_gym/pool_matrix", size=20, eval_size=4),
]


def by_task(config):
    return config.task


def write_jsonl(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def qa(count: int) -> list[dict]:
    return [{"prompt": f"q{i}", "label": f"a{i}"} for i in range(count)]


@pytest.mark.parametrize("config", GENERATED, ids=by_task)
def test_problems_depend_on_their_index_only(config):
    train, held_out = load_datasets(config)
    assert (len(train), len(held_out)) == (config.size, config.eval_size)
    for split in (train, held_out):
        indices = list(range(len(split)))
        random.Random(0).shuffle(indices)
        shuffled = {index: split[index] for index in indices}
        assert [shuffled[i] for i in range(len(split))] == list(split)
        assert all(problem.index == i for i, problem in shuffled.items())


@pytest.mark.parametrize("config", GENERATED, ids=by_task)
def test_another_process_makes_the_same_problems(config):
    train, held_out = load_datasets(config)
    here = repr([train[3], train[0], held_out[1]])
    program = (
        "from samebit.recipes.data.tasks.base import DataConfig\n"
        "from samebit.recipes.data.tasks.registry import load_datasets\n"
        f"train, held_out = load_datasets({config!r})\n"
        "second, third, first = train[0], held_out[1], train[3]\n"
        "print(repr([first, second, third]))"
    )
    # sys.path goes along, so that the child finds the packages however this process did.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here


@pytest.mark.parametrize("config", GENERATED, ids=by_task)
def test_splits_share_no_prompt(config):
    train, held_out = load_datasets(config)
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}


@pytest.mark.parametrize("config", GENERATED, ids=by_task)
def test_generation_leaves_the_global_generators_alone(config):
    before = random.getstate(), np.random.get_state()[1].tobytes()
    train, _ = load_datasets(config)
    train[0]
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before


def test_another_seed_makes_other_problems():
    for task in ("reverse_digits", "reasoning_gym/chain_sum"):
        first, _ = load_datasets(DataConfig(task=task, size=20, eval_size=2, seed=0))
        second, _ = load_datasets(DataConfig(task=task, size=20, eval_size=2, seed=1))
        assert len({p.prompt for p in first} & {p.prompt for p in second}) < 5


def test_index_outside_the_split():
    for split in load_datasets(DataConfig(task="reverse_digits", size=5, eval_size=5)):
        for index in (-1, 5):
            with pytest.raises(IndexError, match=f"problem {index} of a split of 5; give 0 to 4"):
                split[index]


def test_reverse_digits():
    train, _ = load_datasets(DataConfig(task="reverse_digits", size=50))
    for problem in train:
        assert len(problem.prompt) == 7
        assert problem.prompt == problem.label[::-1] + "="
    # Every short string lands in exactly one split, whatever the seed.
    seen = {True: set(), False: set()}
    for seed in range(3):
        config = DataConfig(
            task="reverse_digits", size=400, eval_size=400, seed=seed, args={"length": 2}
        )
        for held_out, split in zip((False, True), load_datasets(config), strict=True):
            seen[held_out] |= {p.prompt for p in split}
    assert not seen[True] & seen[False]
    assert len(seen[True] | seen[False]) == 100


def test_the_problems_of_reverse_digits_are_pinned():
    """Other strings under a seed would make every old run unrepeatable without a word."""
    config = DataConfig(task="reverse_digits", size=1000, eval_size=3, seed=2, args={"length": 4})
    train, held_out = load_datasets(config)
    assert [train[i].prompt for i in (0, 1, 2, 999)] == ["2040=", "4086=", "4492=", "0098="]
    assert [p.prompt for p in held_out] == ["1859=", "5931=", "9833="]


def test_reasoning_gym_items_are_those_of_disjoint_seeds():
    """From sha256 of data.seed on: first the held-out ones, train items a range further."""
    import reasoning_gym

    config = DataConfig(task="reasoning_gym/chain_sum", size=30, eval_size=10, seed=4)
    train, held_out = load_datasets(config)
    first = int.from_bytes(hashlib.sha256(b"4").digest()[:4]) // 2
    for split, seed in ((held_out, first), (train, first + 2**24)):
        source = reasoning_gym.create_dataset("chain_sum", seed=seed, size=len(split))
        items = [source[i] for i in range(len(split))]
        assert [p.prompt for p in split] == [item["question"] for item in items]
        assert [p.label for p in split] == [item["answer"] for item in items]


def test_a_train_question_that_is_held_out_is_drawn_again():
    # Two one-digit numbers and a sign: few questions, which disjoint seeds repeat.
    args = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    config = DataConfig(task="reasoning_gym/chain_sum", size=300, eval_size=60, args=args)
    train, held_out = load_datasets(config)
    assert len({p.prompt for p in held_out}) > 30
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    exhausted, _ = load_datasets(
        DataConfig(task="reasoning_gym/chain_sum", size=300, eval_size=3000, args=args)
    )
    with pytest.raises(ValueError, match="16 draws for train problem .* are all held-out ones"):
        list(exhausted)


def test_reasoning_gym_composite():
    parts = [{"name": name, "weight": 1.0, "config": {}} for name in ("chain_sum", "gcd")]
    config = DataConfig(
        task="reasoning_gym/composite", size=20, eval_size=4, args={"datasets": parts}
    )
    train, _ = load_datasets(config)
    sources = {p.metadata["entry"]["metadata"]["source_dataset"] for p in train}
    assert sources == {"chain_sum", "gcd"}


def test_worked_examples():
    """Earlier turns with the answers, of the question's own task, whose questions are in no split;
    the problems are else what they are without."""
    parts = [{"name": name, "weight": 1.0, "config": {}} for name in ("chain_sum", "gcd")]
    settings = {"size": 20, "eval_size": 4, "args": {"datasets": parts}, "chat": True}
    plain = load_datasets(DataConfig(task="reasoning_gym/composite", **settings))
    shown = load_datasets(DataConfig(task="reasoning_gym/composite", few_shot=2, **settings))
    first, questions = {}, set()
    for before, after in zip(plain, shown, strict=True):
        for one, other in zip(before, after, strict=True):
            *turns, question = other.prompt
            assert question == {"role": "user", "content": one.prompt}
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
            task = other.metadata["entry"]["metadata"]["source_dataset"]
            assert turns == first.setdefault(task, turns)
            questions.add(one.prompt)
            assert (one.label, one.metadata) == (other.label, other.metadata)
    assert set(first) == {"chain_sum", "gcd"}
    examples = {turn["content"] for turns in first.values() for turn in turns[::2]}
    assert len(examples) == 4
    assert not examples & questions
    sums = [turn["content"] for turn in first["chain_sum"]]
    asked = re.search(r"problem: (.*) = *$", sums[0]).group(1)
    assert eval(asked) == int(sums[1])


def test_worked_examples_are_in_no_split():
    """Of few questions, which disjoint seeds repeat."""
    args = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    config = DataConfig(
        task="reasoning_gym/chain_sum", size=300, eval_size=60, args=args, chat=True, few_shot=20
    )
    train, held_out = load_datasets(config)
    *turns, _ = train[0].prompt
    examples = {turn["content"] for turn in turns if turn["role"] == "user"}
    assert len(examples) == 20
    for split in (train, held_out):
        assert not examples & {problem.prompt[-1]["content"] for problem in split}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "revers"}, "data.task is 'revers'; give one of file, reverse_digits"),
        ({"task": "reasoning_gym"}, "data.task is 'reasoning_gym'"),
        ({"task": "file/x"}, "data.task is 'file/x'"),
        ({"task": "file"}, "data.path is unset"),
        ({"task": "file", "path": "x.csv"}, "suffix '.csv'; give a .jsonl, .parquet or .arrow"),
        ({"task": "reverse_digits", "size": 0}, "data.size is 0; give at least 1"),
        ({"task": "reverse_digits", "eval_size": -1}, "data.eval_size is -1; give 0 or more"),
        ({"task": "reverse_digits", "path": "x.jsonl"}, "generates its problems"),
        ({"task": "reverse_digits", "args": {"len": 3}}, r"\['len'\].* takes only 'length'"),
        ({"task": "reverse_digits", "args": {"length": 1}}, "data.args.length is 1"),
        ({"task": "reasoning_gym/chain_sm"}, "'chain_sm'.*close matches: chain_sum"),
        ({"task": "reasoning_gym/chain_sum", "args": {"terms": 2}}, "'terms'"),
        ({"task": "reasoning_gym/chain_sum", "args": {"seed": 2}}, "set data.seed"),
        ({"task": "reasoning_gym/chain_sum", "args": {"min_terms": -1}}, "must be positive"),
        ({"task": "reasoning_gym/chain_sum", "size": 2**25}, "at most 16777216 problems"),
        ({"task": "reverse_digits", "chat": True, "few_shot": 1}, "data.few_shot is 1.*task is"),
        ({"task": "reasoning_gym/gcd", "few_shot": 1}, "data.few_shot is 1.*data.chat is false"),
        ({"task": "reasoning_gym/gcd", "chat": True, "few_shot": -1}, "data.few_shot is -1.*0 to"),
        (
            {"task": "reasoning_gym/graph_color", "chat": True, "few_shot": 2},
            "has only 0 questions",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        load_datasets(DataConfig(**settings))


@pytest.mark.skipif(not sys.flags.hash_randomization, reason="PYTHONHASHSEED is fixed")
@pytest.mark.parametrize("name", ["ransom_note", "composite"])
def test_tasks_that_depend_on_the_hash_seed_are_refused(name):
    parts = {"datasets": [{"name": "ransom_note", "weight": 1.0, "config": {}}]}
    args = parts if name == "composite" else {}
    with pytest.raises(ValueError, match="start Python with PYTHONHASHSEED=0"):
        load_datasets(DataConfig(task=f"reasoning_gym/{name}", args=args))


def test_file_holds_out_the_last_records(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", qa(10))
    train, held_out = load_datasets(DataConfig(path=path, eval_size=3))
    assert [p.prompt for p in train] == [f"q{i}" for i in range(7)]
    assert [(p.index, p.prompt, p.label) for p in held_out] == [
        (0, "q7", "a7"),
        (1, "q8", "a8"),
        (2, "q9", "a9"),
    ]
    train, held_out = load_datasets(DataConfig(path=path, eval_size=0))
    assert (len(train), len(held_out)) == (10, 0)
    with pytest.raises(ValueError, match="data.eval_size is 10 .*; give at most 9"):
        load_datasets(DataConfig(path=path, eval_size=10))


def test_file_never_trains_on_a_held_out_prompt(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", qa(6))
    eval_path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "q2", "label": "other"}])
    train, held_out = load_datasets(DataConfig(path=path, eval_path=eval_path))
    assert [(p.index, p.prompt) for p in train][:3] == [(0, "q0"), (1, "q1"), (2, "q3")]
    assert [p.label for p in held_out] == ["other"]
    assert "1 records" in caplog.text
    with pytest.raises(ValueError, match="every training prompt"):
        load_datasets(DataConfig(path=path, eval_path=path))
    chats = [{"role": "user", "content": "q"}], [{"content": "q", "role": "user"}]
    records = [{"prompt": chat, "label": "a"} for chat in chats]
    path = write_jsonl(tmp_path / "chats.jsonl", [*qa(1), *records])
    assert len(load_datasets(DataConfig(path=path, eval_size=1))[0]) == 1


def test_file_parquet_is_read_like_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [
        {
            "chat": [{"role": "user", "content": f"q{i}"}],
            "extra": {"answer": i},
            "source": "a",
        }
        for i in range(4)
    ]
    records[1]["chat"].insert(0, {"role": "system", "content": "s", "name": "n"})
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), parquet)
    splits = [
        load_datasets(
            DataConfig(
                path=path,
                prompt_key="chat",
                label_key="extra.answer",
                metadata_keys=["source", "extra.answer"],
                eval_size=1,
            )
        )
        for path in (str(parquet), write_jsonl(tmp_path / "a.jsonl", records))
    ]
    assert list(splits[0][0])[0] == list(splits[1][0])[0]
    problem = splits[0][1][0]
    assert problem.prompt == [{"role": "user", "content": "q3"}]
    assert (problem.label, problem.metadata) == ("3", {"source": "a", "extra.answer": 3})


def test_file_keys_are_taken_whole_first_and_as_paths_second(tmp_path):
    """A column may have a dot in its name."""
    record = {"q.text": "whole", "q": {"text": "path", "more": {"label": "deep"}}}
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    config = DataConfig(
        path=path,
        eval_size=0,
        prompt_key="q.text",
        label_key="q.more.label",
        metadata_keys=["q.more", "q.text"],
    )
    [problem] = load_datasets(config)[0]
    assert (problem.prompt, problem.label) == ("whole", "deep")
    assert problem.metadata == {"q.more": {"label": "deep"}, "q.text": "whole"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no record"),
        ('{"prompt": "q", "label": "a"}\n\n{"prompt": \n', "line 3 is not JSON"),
        ("[1]\n", "line 1 is a JSON list; give an object"),
        ('{"prompt": "q", "answer": 1}\n', r"line 1 has no 'label'.*\['answer', 'prompt'\]"),
        ('{"prompt": 3, "label": "a"}\n', "line 1: 'prompt' is 3; give a text or a list"),
        ('{"prompt": [{"role": "user"}], "label": "a"}\n', "give texts `role` and `content`"),
        ('{"prompt": "q", "label": null}\n', "line 1: 'label' is None; give a text or a number"),
    ],
)
def test_file_errors_name_the_record(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_datasets(DataConfig(path=str(path)))
    assert str(path) in str(caught.value)


def test_file_missing_or_unreadable(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl does not exist"):
        load_datasets(DataConfig(path=str(tmp_path / "nowhere.jsonl")))
    damaged = tmp_path / "a.parquet"
    damaged.write_bytes(b"no parquet here")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        load_datasets(DataConfig(path=str(damaged)))


def test_config_is_an_omegaconf_structured_config():
    from omegaconf import OmegaConf

    config = OmegaConf.merge(
        OmegaConf.structured(DataConfig),
        {"task": "reverse_digits", "args": {"length": 4}, "size": 3, "eval_size": 1},
    )
    train, _ = load_datasets(OmegaConf.to_object(config))
    assert len(train[0].label) == 4
