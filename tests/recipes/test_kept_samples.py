"""The samples of runs: searched and sorted as if each were read, whatever a page holds of them."""

import json
import random

import pytest

from samebit.recipes.cli.main import main
from samebit.recipes.run.kept_samples import ORDERS, PER_PAGE, KeptSamples, Query, found_in
from samebit.recipes.run.pages import open_runs

WORDS = ["Sum", "of", "straße", "is", "12", "π", "a\nb", '"q"', "CAFÉ", "call"]


def rows_of(drawn, count):
    return [
        {
            "step": i // 3,
            "kind": drawn.choice(["eval", "train"]),
            "prompt": drawn.choice(
                ["what?", [{"role": "user", "content": " ".join(drawn.choices(WORDS, k=3))}]]
            ),
            "completion": " ".join(drawn.choices(WORDS, k=drawn.randint(1, 9))),
            "label": drawn.choice(WORDS),
            "reward": drawn.randint(-2, 2) / 2,
        }
        for i in range(count)
    ]


def kept(rows, path="samples.jsonl", ascii_alone=True):
    samples = KeptSamples(path)
    samples.take([json.dumps(row, ensure_ascii=ascii_alone).encode() for row in rows])
    return samples


def text_of(row):
    prompt = row["prompt"]
    said = prompt if isinstance(prompt, str) else f"user: {prompt[0]['content']}"
    return f"{said}\n{row['completion']}\n{row['label']}".lower()


SORTED = {
    "newest first": lambda row: -row["step"],
    "oldest first": lambda row: row["step"],
    "highest reward": lambda row: -row["reward"],
    "lowest reward": lambda row: row["reward"],
    "longest": lambda row: -len(row["completion"]),
    "shortest": lambda row: len(row["completion"]),
}


@pytest.mark.parametrize("ascii_alone", [True, False])
def test_what_is_found_is_what_reading_all_finds(ascii_alone):
    drawn = random.Random(3)
    rows = [rows_of(drawn, 150), rows_of(drawn, 70)]
    runs = [(i, kept(part, ascii_alone=ascii_alone)) for i, part in enumerate(rows)]
    assert [*SORTED] == [*ORDERS]
    some = 0
    for order, rank in SORTED.items():
        for words in (
            "",
            "sum",
            "STRASSE",
            "straße",
            "π",
            "user: sum",
            "a\nb",
            "café",
            '"Q" is',
            "12",
            "x",
        ):
            for kind in ("", "eval"):
                right = [
                    {"i": i, "completion": row["completion"], "reward": row["reward"]}
                    for i, part in enumerate(rows)
                    for row in part
                    if words.lower() in text_of(row) and kind in ("", row["kind"])
                ]
                pages = [found_in(runs, Query(words, kind, order, page)) for page in range(12)]
                samples = [s for page in pages[: pages[0]["pages"]] for s in page["samples"]]
                assert pages[0]["num_found"] == len(right)
                assert pages[-1]["page"] == pages[0]["pages"] - 1  # there is no page behind
                ranks = [rank(s["sample"]) for s in samples]
                assert ranks == sorted(ranks)
                by = lambda s: (s["i"], s["completion"], s["reward"])  # noqa: E731
                found = [s["sample"] | {"i": s["i"]} for s in samples]
                assert sorted(map(by, found)) == sorted(map(by, right))
                some += len(right)
    assert some > 1000


def test_a_page_holds_the_first_of_every_order():
    """However few it can hold: what is best, worst, longest and newest of all is on it."""
    drawn = random.Random(5)
    rows = rows_of(drawn, 3000)
    rows[1234] |= {"reward": 9.0, "completion": "a" * 500}
    rows[777] |= {"reward": -9.0, "completion": ""}
    samples = kept(rows)
    for most_bytes in (40_000, 100_000):
        chosen = samples.chosen(most_bytes)
        size = sum(len(json.dumps(rows[number])) for number in chosen)
        assert most_bytes / 2 < size <= most_bytes
        assert chosen == sorted(set(chosen))
        assert {0, 777, 1234, 2999} <= set(chosen)
        for order, rank in SORTED.items():
            first = sorted(range(3000), key=lambda n: rank(rows[n]))[
                : PER_PAGE if size > 50_000 else 3
            ]
            assert set(first) <= set(chosen), order
    assert samples.chosen(10**7) == list(range(3000))
    assert kept([]).chosen(100) == []


GOOD = {"step": 1, "kind": "eval", "prompt": "p", "completion": "c", "label": "l", "reward": 1.0}
TOKENS = {"tokens": ["a", "b"], "logprobs": [-1.0, -2.0]}
DAMAGED = {
    "no `step`": ({"step": None}, "no whole number `step`"),
    "kind": ({"kind": 3}, "its 'kind' is not a text"),
    "reward": ({"reward": "1"}, "its 'reward' is not a finite number"),
    "infinite": ({"reward": 1e999}, "it holds Infinity, which no run writes"),
    "completion": ({"completion": None}, "its 'completion' is not a text"),
    "tokens": (TOKENS | {"tokens": "ab"}, "its 'tokens' is not a list of texts"),
    "fewer log-probs": (
        TOKENS | {"logprobs": [-1.0]},
        "it has other than one log-prob of each token",
    ),
    "none": ({"tokens": ["a"]}, "it has other than one log-prob of each token"),
    "mask": (TOKENS | {"loss_mask": [1]}, "it has other than one mask of each token"),
    "text": (TOKENS | {"logprobs": [-1.0, "x"]}, "a log-prob of it is no finite number"),
    "tools": ({"tools": ["f"]}, "its 'tools' is not a list of objects"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_sample_is_named(case):
    """And none of those that came with it is taken, so that they come again."""
    change, fault = DAMAGED[case]
    samples = kept([GOOD, GOOD | TOKENS])
    lines = [json.dumps(row).encode() for row in (GOOD, GOOD | change, GOOD)]
    with pytest.raises(ValueError, match=f"^samples.jsonl, line 4 is damaged: {fault}"):
        samples.take(lines)
    assert len(samples) == len(samples.facts) == 2
    samples.take(lines[:1])
    assert len(samples) == 3


def test_deep_nesting_is_damage():
    with pytest.raises(ValueError, match="line 1 is damaged: it is nested too deeply"):
        kept([]).take([b"[" * 10**6])


CALL = {"function": {"name": "lookup", "arguments": {"city": "Zürich"}}, "type": "function"}
CHAT = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "tool_calls": [CALL, {"name": "clock", "arguments": "{}"}]},
    {"role": "tool", "name": "lookup", "content": "rain"},
    {"role": "assistant", "content": "wait", "tool_calls": [CALL]},
]
SAID = (
    'user: weather?\n\nassistant: calls lookup({"city": "Zürich"})\ncalls clock({})\n\n'
    'tool lookup: rain\n\nassistant: wait\ncalls lookup({"city": "Zürich"})'
)


def test_calls_and_tools_are_shown_and_found(tmp_path, capsys):
    """On the page of one run and of several; a message with calls needs no content."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n')
    row = GOOD | {"prompt": CHAT, "tools": [{"function": {"name": "lookup"}}, {"name": "clock"}]}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    [data] = open_runs([str(run)], "runs")
    [shown] = data.shown()["samples"]
    assert (shown["prompt"], shown["tools"]) == (SAID, ["lookup", "clock"])
    assert [data.samples.find(Query(words)) for words in ("Zürich", "calls CLOCK", "x")] == [
        [0], [0], [],
    ]  # fmt: skip
    from samebit.recipes.run.report import write_report

    page = write_report(run, title="t", summary={}, config_yaml="").read_text()
    assert "calls clock({})" in page
    assert main(["report", str(run), f"out={tmp_path / 'page.html'}"]) == 0
