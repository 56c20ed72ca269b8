"""tests/programs/draft_figures.py: what runs of drafts have come to, by figures that are known."""

import json

import pytest
from programs import draft_figures

from samebit.recipes.cli.compose import resolve
from samebit.recipes.run.secrets import to_yaml


def bench(folder, batch, **entry):
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps({"batches": {batch: entry}}))
    return str(folder)


def run(folder, lengths=(), **summary):
    folder.mkdir()
    rows = [{"step": i, "rollout/spec_accept_length": x} for i, x in enumerate(lengths)]
    rows.insert(0, {"step": 0, "eval/reward_mean": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


@pytest.mark.parametrize("name", ["smollm2_draft", "smollm2_draft_boards"])
def test_a_bench_asks_what_a_draft_was_measured_on(tmp_path, name):
    """The words give it the run's data, lengths and seed."""
    words = [f"experiment={name}", "model.path=m", "seed=3"]
    trained = resolve("eagle3", words)
    (tmp_path / "config.yaml").write_text(to_yaml(trained))
    found = resolve("bench speculative", ["model=m", *draft_figures.words(tmp_path)])
    assert found.data == trained.data
    assert found.input_len == trained.rollout.max_prompt_len
    assert found.output_len == trained.rollout.max_new_tokens
    assert (found.seed, found.temperature) == (3, 1.0)


def test_drafts_stand_beside_their_bars(tmp_path, capsys):
    """Those that have ended."""
    own = {"suffix_accept_length": 1.25, "greedy_suffix_accept_length": 1.5, "entropy": 0.5}
    own |= {"steps": 400, "perf/wall_s": 1200.0}
    good = run(tmp_path / "seven", accept_length=2.5, greedy_accept_length=2.75, **own)
    late = own | {"perf/wall_s": 1201.0}
    bad = run(tmp_path / "one", accept_length=1.5, greedy_accept_length=3.0, **late)
    (tmp_path / "none").mkdir()
    assert draft_figures.main("trained", [good, bad, str(tmp_path / "none")]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert "2.500 (>= 2.5) " in first
    assert "2.750 (>= 2.8 MISSED) " in first
    assert first.endswith(" 0.500         20.000 (<= 20)")
    assert "1.500 (>= 2.5 MISSED) " in second
    assert second.endswith(" 20.017 (<= 20 MISSED)")


def test_an_online_draft_must_not_lose(tmp_path, capsys):
    """Nor may any draft move the target."""
    up, down = [2.0] * 20 + [3.0] * 10, [3.0] * 10 + [2.0] * 20
    learning = run(tmp_path / "learning", up, weights_digest="a")
    frozen = run(tmp_path / "frozen", down, weights_digest="a")
    none, other = (run(tmp_path / x, weights_digest=x[0]) for x in ("absent", "other"))
    assert draft_figures.main("online", [learning, frozen, none]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["learning", "2.000", "3.000"] in lines
    assert ["frozen", "3.000", "2.000"] in lines
    assert draft_figures.main("online", [frozen, learning, none]) == 1
    assert draft_figures.main("online", [learning, frozen, other]) == 1


def entry(seconds, verifications, length=0.0, rate=1.0):
    return {
        "seconds": seconds,
        "verifications": verifications,
        "accept_length": length,
        "output_tokens_s": {"median": rate},
    }


def test_drafting_is_what_a_step_takes_longer(tmp_path, capsys):
    """Than one that verifies as many guesses, which cost nothing."""
    drafts = {
        "none": {"seconds": [9.0]},
        "simulated": entry([0.5, 0.5], 100),  # 10 ms a step
        "eagle3": entry([1.0, 1.0], 80, 2.5),  # 25 ms
        "peagle": entry([0.75, 0.75], 100, 2.0),  # 15 ms
    }
    assert draft_figures.main("block", [bench(tmp_path / "bench", "1", **drafts)]) == 0
    _, chain, block = (line.split() for line in capsys.readouterr().out.splitlines())
    assert chain == ["bench", "eagle3", "2.500", "15.000", "0.167", "1.0"]
    assert block == ["bench", "peagle", "2.000", "5.000", "0.400", "1.0"]
    with pytest.raises(ValueError, match="is of 8 samples at a time; give one of 1"):
        draft_figures.main("block", [bench(tmp_path / "eight", "8", **drafts)])


def test_rows_that_are_verified(tmp_path, capsys):
    """By the time of a decode step of the same samples."""
    cheap = {"simulated": {"x_none": 0.95, "acceptance": [0.0] * 7}}
    dear = {"simulated": {"x_none": 0.8, "acceptance": [0.0] * 3}}
    folders = bench(tmp_path / "8", "8", **cheap), bench(tmp_path / "16", "16", **dear)
    assert draft_figures.main("rows", folders) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["8", "8", "64", "1.053", "(<=", "1.1)"]
    assert lines[1].split() == ["16", "4", "64", "1.250", "(<=", "1.1", "MISSED)"]
