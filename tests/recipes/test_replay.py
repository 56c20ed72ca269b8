"""schedule.jsonl and samebit replay: what was drawn when, by which weights, and trained on when."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from run_children import in_one_process
from safetensors.torch import load_file, save
from test_partial_rollouts import DYNAMIC, PARTIAL, SOME
from test_partial_rollouts import WORDS as PARTS
from test_stale_rollouts import BESIDE, MANY, ONE, RARE, TWO, WAITS

from samebit.recipes import grpo
from samebit.recipes.cli.main import main
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.partial_rollouts import PartialRollouts
from samebit.recipes.run.rollouts import list_rollouts, load_rollout

DROPS = (*PARTS, *SOME, *DYNAMIC)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Rewards and engines run in this process."""
    in_one_process(monkeypatch.setattr)
    monkeypatch.setattr(grpo, "write_report", lambda *_, **__: None)


def replayed(folder, capsys):
    """The exit code, and what it says."""
    code = main(["replay", str(folder)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize(
    "words",
    [
        ONE,
        PARTIAL,
        *(pytest.param(x, marks=pytest.mark.long) for x in (RARE, DROPS, TWO, MANY, WAITS)),
        pytest.param((*PARTIAL, *BESIDE[0]), marks=pytest.mark.long),
    ],
    ids=["one", "partial", "rare", "dropped", "two", "turns", "critic", "partial and critic"],
)
def test_a_run_is_what_its_configuration_gives(whole, capsys, words):
    """And what it has saved of its rollouts is what the schedule says."""
    folder, _ = whole(words)
    said = "the schedule of 4 steps is what the configuration gives; rollouts of 4 steps are as"
    code, text = replayed(folder / "run", capsys)
    assert (code, text[: len(said)]) == (0, said)


def test_what_a_row_says(whole):
    """The row of every step, from what else the run has left."""
    folder, (_, metrics) = whole(PARTIAL)
    rows = read_rows(folder / "run" / "schedule.jsonl")
    files, begin = list_rollouts(folder / "run"), 0
    for row, figures in zip(rows, metrics[1:], strict=True):
        samples = load_rollout(files[row["step"]])
        assert row["trained"] == [x.sample_id for x in samples[::2]]
        assert (row["rounds"], row["begin"]) == (figures["rollout/stints"], begin)
        begin += figures["rollout/prompts_drawn"]
        pending = sum(len(group["pending"]) for group in row["drawn"])
        assert pending == figures["rollout/pending_samples"]
        newest = max(span.version for x in samples for span in x.version_spans)
        assert row["version"] == [newest.step, newest.digest]
        assert row["drawn_after"] == row["step"] - 1
        assert row["equal"] == []
    assert [row["served"] for row in rows[:-1]] == [row["version"] for row in rows[1:]]


def lie(folder, where, step, change):
    """A copy of a run whose row of a step is changed."""
    shutil.copytree(folder / "run", where)
    file = where / "schedule.jsonl"
    rows = read_rows(file)
    change(rows[step - 1])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where


def of_pending(row):
    """A group with an unfinished sample, and that one's number."""
    return next((g, g["pending"][0]) for g in row["drawn"] if g["pending"])


def longer(row):
    row["drawn"][-1]["tokens"][0][1] += 1


def shorter(row):
    group, i = of_pending(row)
    group["tokens"][i][1] -= 1


def finished(row):
    group, i = of_pending(row)
    group["pending"].remove(i)


def another(row):
    row["trained"][-1] = row["drawn"][-1]["id"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.update(step=4), "step 3: step is 4; the configuration gives 3"),
        (lambda row: row.update(begin=3), "step 3: begin is 3; the configuration gives "),
        (lambda row: row.update(drawn_after=0), "step 3: drawn_after is 0; the configuration giv"),
        (lambda row: row.update(version=[2, "0" * 16]), "step 3: version is "),
        (lambda row: row.update(rounds=9), "step 3: rounds is 9; the configuration gives "),
        (lambda row: row["drawn"].reverse(), "step 3: drawn is ["),
        (lambda row: row["drawn"].pop(0), "step 3: nothing is drawn of "),
        (lambda row: row.update(equal=row["trained"]), "step 3: "),
        (another, "step 3: trained is ["),
        (lambda row: row.update(served=None), "step 3: served is False; the configuration gives"),
        (lambda row: row["served"].__setitem__(0, 9), "step 3: served's optimizer step is 9; the "),
        (lambda row: row["drawn"][0]["tokens"][0].__setitem__(0, 1), "step 3: tokens of "),
        (lambda row: row["drawn"][-1]["tokens"][0].__setitem__(0, 1), "step 3: tokens of "),
        (lambda row: row["drawn"].append(row["drawn"][0]), "step 3: drawn is ["),
        (longer, "step 3: tokens of "),
        (shorter, "step 3: sample "),
        (finished, "step 4: "),  # that goes on although it has ended
    ],
)
def test_the_first_difference_is_named(whole, tmp_path, capsys, change, said):
    """Whatever the row of step 3 says that was otherwise."""
    code, text = replayed(lie(whole(PARTIAL)[0], tmp_path / "run", 3, change), capsys)
    assert (code, text[: 18 + len(said)]) == (1, f"first difference: {said}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.update(drawn_after=2), "step 3: drawn_after is 2; the configuration give"),
        (
            lambda row: row["drawn"][0].update(pending=[1]),
            "step 3: pending of 0x200000000 is [1]; ",
        ),
        (
            lambda row: row["drawn"].pop(),
            "step 3: nothing is drawn of 0x200002000, which is not fi",
        ),
        (lambda row: row.update(trained=row["trained"][1:]), "step 3: trained is ["),
    ],
)
def test_of_what_is_drawn_ahead_too(whole, tmp_path, capsys, change, said):
    code, text = replayed(lie(whole(ONE)[0], tmp_path / "run", 3, change), capsys)
    assert (code, text[: 18 + len(said)]) == (1, f"first difference: {said}")


def test_rollouts_that_are_others(whole, tmp_path, capsys):
    """A shorter sample would be as good a schedule, but it is not what was drawn."""

    def change(row):
        ends = (t for g in row["drawn"] if g["id"] in row["trained"] for t in g["tokens"])
        next(t for t in ends if t[1] - t[0] > 1)[1] -= 1

    code, text = replayed(lie(whole(ONE)[0], tmp_path / "run", 4, change), capsys)
    assert code == 1
    assert text.startswith("first difference: step 4: sample 0x3000")
    assert " of the saved rollout has " in text


def test_who_goes_on_has_computed_the_context_anew(whole, tmp_path, capsys):
    """Else the log-probs of what follows would be no single version's."""
    folder = lie(whole(PARTIAL)[0], tmp_path / "run", 1, lambda row: None)
    for file in list_rollouts(folder).values():
        tensors = load_file(file)
        spans = json.loads(tensors["version_spans"].numpy().tobytes())
        if mixed := [x for x in spans if len(x) > 1]:
            mixed[0][1][1] = False
            data = bytearray(json.dumps(spans).encode())
            file.write_bytes(
                save(tensors | {"version_spans": torch.frombuffer(data, dtype=torch.uint8)})
            )
            break
    code, text = replayed(folder, capsys)
    assert code == 1
    assert ", which computed the context anew" in text.partition("; the schedule says ")[2]


def test_a_log_that_ends_too_soon_and_none_at_all(whole, tmp_path, capsys):
    folder = lie(whole(ONE)[0], tmp_path / "run", 1, lambda row: None)
    rows = (folder / "schedule.jsonl").read_text().splitlines(keepends=True)
    (folder / "schedule.jsonl").write_text("".join(rows[:3]))
    assert replayed(folder, capsys) == (1, "first difference: it ends after step 3 of 4\n")
    (folder / "summary.json").unlink()  # it goes on
    assert replayed(folder, capsys)[0] == 0
    (folder / "schedule.jsonl").write_text('{"step": 1}\n')
    code, text = replayed(folder, capsys)
    assert (code, "schedule.jsonl, line 1 is damaged: no row of a schedule" in text) == (2, True)
    (folder / "schedule.jsonl").write_text("")
    code, text = replayed(folder, capsys)
    assert (code, "schedule.jsonl holds no step yet" in text) == (2, True)
    (folder / "schedule.jsonl").unlink()
    code, text = replayed(folder, capsys)
    assert code == 2
    assert "holds no schedule.jsonl: runs of grpo with rollout.max_staleness or rollout.p" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(begin=0.0),
        lambda row: row.update(rounds=True),
        lambda row: row.update(equal=[[1]]),
        lambda row: row.update(more=1),
        lambda row: row["drawn"][0].update(id=[0]),
        lambda row: row["drawn"][0].update(id="0"),
        lambda row: row["drawn"][0]["tokens"][0].__setitem__(1, None),
        lambda row: row["drawn"][0]["tokens"][0].__setitem__(1, -1),
        lambda row: row["drawn"][0]["tokens"][0].append(1),
        lambda row: row["served"].__setitem__(1, 5),
    ],
)
def test_a_line_that_is_no_row(whole, tmp_path, capsys, change):
    """It is named, whatever is of another kind in it."""
    folder = lie(whole(ONE)[0], tmp_path / "run", 2, change)
    code, text = replayed(folder, capsys)
    assert (code, "schedule.jsonl, line 2 is damaged: no row of a schedule" in text) == (2, True)


def test_what_the_last_weights_are(whole, tmp_path, capsys):
    """Nothing is drawn by them, but the summary says their digest."""
    digest, none = whole(ONE)[1][0]["weights_digest"], "0" * 16
    folder = lie(whole(ONE)[0], tmp_path / "run", 4, lambda row: row.update(served=[4, none]))
    said = f"first difference: step 4: served's digest is {none}; summary.json says {digest}\n"
    assert replayed(folder, capsys) == (1, said)


def test_a_rollout_of_other_prompts(whole, tmp_path, capsys):
    """Although what it holds was drawn just so."""
    folder = lie(whole(ONE)[0], tmp_path / "run", 1, lambda row: None)
    files = list_rollouts(folder)
    shutil.copy(files[1], files[2])
    code, text = replayed(folder, capsys)
    assert code == 1
    assert text.startswith("first difference: step 2: the saved rollout has the samples 0x0, 0x1, ")


def test_rewards_that_are_not_equal(whole, tmp_path, capsys):
    """What a step has dropped is held to the rewards that it got."""
    folder = lie(whole(DROPS)[0], tmp_path / "run", 1, lambda row: None)
    assert replayed(folder, capsys)[0] == 0
    step = next(row["step"] for row in read_rows(folder / "schedule.jsonl") if row["equal"])
    file = list_rollouts(folder)[step]
    tensors = load_file(file)
    tensors["dropped_rewards"][0] += 1
    file.write_bytes(save(tensors))
    code, text = replayed(folder, capsys)
    said = f"first difference: step {step}: equal rewards in the saved rollout have "
    assert (code, text[: len(said)]) == (1, said)


def test_a_run_that_was_made_longer(whole, train, tmp_path, capsys, monkeypatch):
    """What it said at its earlier end is gone, as it goes on."""
    shutil.copytree(whole(PARTIAL)[0], tmp_path / "longer")
    original = PartialRollouts.begin

    def dies(rollouts, trained, place):
        original(rollouts, trained, place)
        if trained == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(PartialRollouts, "begin", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "longer", (*PARTIAL, "trainer.num_steps=6"), resume=True)
    assert not (tmp_path / "longer" / "run" / "summary.json").exists()
    code, text = replayed(tmp_path / "longer" / "run", capsys)
    assert (code, text[:23]) == (0, "the schedule of 5 steps")


@pytest.mark.parametrize(("task", "code"), [("file", 0), ("reverse_digits", 1)])
def test_fewer_refills_than_a_step_took(whole, tmp_path, capsys, task, code):
    """A run on records in files may have been resumed with another rollout.max_refills."""
    folder = lie(whole(DROPS)[0], tmp_path / "run", 1, lambda row: None)
    config = OmegaConf.load(folder / "config.yaml")
    config.rollout.max_refills, config.data.task = 0, task
    OmegaConf.save(config, folder / "config.yaml")
    assert max(row["rounds"] for row in read_rows(folder / "schedule.jsonl")) > 4
    assert replayed(folder, capsys)[0] == code


def test_diff_compares_schedules(whole, tmp_path, capsys):
    """A digest of weights that differs is found where nothing else tells of them."""
    folder = whole(ONE)[0] / "run"
    other = lie(folder.parent, tmp_path / "run", 1, lambda row: row.update(served=[1, "0" * 16]))
    assert main(["diff", str(folder), str(other)]) == 1
    found = capsys.readouterr().out
    assert "first difference: step 1, schedule, served: [1, '" in found
    assert "[1, '0000000000000000'] in B" in found
    (other / "schedule.jsonl").unlink()
    assert main(["diff", str(folder), str(other)]) == 0
    assert "not compared: schedules that only A has, of steps 1, 2, 3, 4" in capsys.readouterr().out
