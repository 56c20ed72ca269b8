"""samebit diff: the first place where two runs part, to the token, the element and the ulp."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from samebit.recipes import cli
from samebit.recipes.bits import distance
from samebit.trainer.checkpoint import list_checkpoints

SAVED = "logger.save_rollouts=true"


@pytest.fixture(scope="module")
def pair(make_runs, tmp_path_factory):
    """A run whose rollouts are kept, and its copy."""
    runs = make_runs(tmp_path_factory.mktemp("diff"))
    runs.train("one", SAVED)
    shutil.copytree(runs.folder / "one", runs.folder / "two")
    return runs


@pytest.fixture
def two(pair, tmp_path):
    """(the run, a copy that this test may alter)."""
    copy = shutil.copytree(pair.folder / "one", tmp_path / "copy")
    return pair.folder / "one", copy


def diff(capsys, *arguments):
    """(exit code, what was printed)."""
    code = cli.main(["diff", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_equal_runs(pair, capsys):
    code, text = diff(capsys, pair.folder / "one", pair.folder / "two")
    assert code == 0
    assert "no difference: metrics of 7 steps, rollouts of 6 steps, checkpoints of" in text


def test_times_are_no_difference(two, capsys):
    file = two[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["perf/train_s"] += 1.0
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert diff(capsys, *two)[0] == 0


def test_another_seed_parts_at_the_first_rollout(pair, capsys):
    """The key that explains it comes first; then step, sample, token, both log-probs."""
    if not (pair.folder / "other").exists():
        pair.train("other", SAVED, "seed=5", "trainer.num_steps=2")
    code, text = diff(capsys, pair.folder / "one", pair.folder / "other")
    assert code == 1
    lines = text.splitlines()
    assert "config: seed: 0 in A, 5 in B" in lines
    [first] = [line for line in lines if line.startswith("first difference")]
    assert first.startswith("first difference: step 0, samples, row 0, ")
    _, more = diff(capsys, pair.folder / "one", pair.folder / "other", "--all")
    assert "then: step 1, rollout, sample 0 (id 0x0), " in more


def test_one_bit_of_one_logprob(two, capsys):
    """Step, sample and token are named, and the distance is one ulp."""
    file = sorted((two[1] / "rollouts").iterdir())[2]
    tensors = load_file(file)
    lens = tensors["lens"].tolist()
    place = sum(lens[:5]) + 1
    old = tensors["logprobs"][place].clone()
    tensors["logprobs"][place] = old.nextafter(torch.tensor(0.0))
    save_file(tensors, file)
    code, text = diff(capsys, *two)
    token = int(tensors["token_ids"][place])
    assert code == 1
    assert "first difference: step 3, rollout, sample 5 (id" in text
    assert f"token 1: {token} with log-prob {old.item():.9g} in A, {token} with" in text
    assert text.rstrip().endswith(", 1 ulps")


def test_one_bit_of_one_weight(two, capsys):
    """The tensor, the element, the distance, and that the file is not what was written."""
    checkpoint = list_checkpoints(two[1] / "checkpoints")[-1]
    [name] = checkpoint.manifest["files"]
    state = torch.load(checkpoint.path / name, weights_only=True)
    key = "decoder.final_layernorm.weight"
    state["params"][key][3] = state["params"][key][3].nextafter(torch.tensor(9.0))
    torch.save(state, checkpoint.path / name)
    code, text = diff(capsys, *two)
    assert code == 1
    assert f"first difference: step {checkpoint.step}, checkpoint, params.{key}: 1 of" in text
    assert "the first at [3] is" in text
    assert "1 ulps; at most 1 ulps" in text
    assert "(the file of B is not what was written" in text


def test_all_shows_more_up_to_a_limit(two, capsys):
    file = two[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[2:]:
        row["train/loss"] += 1.0
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text = diff(capsys, *two, "--all", "limit=3")
    assert code == 1
    assert text.count("first difference: step 2, metrics, train/loss: ") == 1
    assert text.count("then: step") == 2
    assert "and more" in text


def test_a_shorter_run_is_a_difference(two, capsys):
    file = two[1] / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    code, text = diff(capsys, *two)
    assert code == 1
    assert "step 6: only A has it; the last of B is 5" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "is no folder"),
        (lambda folder: folder, "holds no metrics.jsonl and config.yaml of a run"),
    ],
)
def test_what_is_no_run_is_refused(pair, tmp_path, make, message, capsys):
    code, text = diff(capsys, pair.folder / "one", make(tmp_path))
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1


def test_two_folders_are_needed(pair, capsys):
    code, text = diff(capsys, pair.folder / "one")
    assert code == 2
    assert "required: b=..." in text


def test_distances():
    a = torch.tensor([[1.0, -0.0], [2.0, float("nan")]])
    assert distance(a, a.clone()) is None
    b = a.clone()
    b[0, 1] = 0.0
    b[1, 0] = torch.tensor(2.0).nextafter(torch.tensor(3.0))
    found = distance(a, b)
    assert (found.num_differing, found.index, found.ulps, found.max_ulps) == (2, (0, 1), 0, 1)
    assert distance(torch.tensor([5]), torch.tensor([9])).ulps == 4
