"""samebit diff: the first place where two runs part, to the token, the element and the ulp."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from samebit.recipes.cli.main import main
from samebit.recipes.diff import rollout_differences
from samebit.recipes.run.rollouts import SavedSample
from samebit.recipes.verification.bits import Distance, distance
from samebit.trainer.checkpoint import MANIFEST, list_checkpoints, manifest_text

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
    code = main(["diff", *map(str, arguments)])
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
    assert text.rstrip().endswith(", 1 ulp")


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
    assert "in B, 1 ulp; at most 1 ulp; SHA-256 " in text
    assert "(the file of B is not what was written" in text


def test_the_last_bit_of_a_metric_counts(two, capsys):
    file = two[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    loss = rows[2]["train/loss"]
    rows[2]["train/loss"] = math.nextafter(loss, 9)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text = diff(capsys, *two)
    assert code == 1
    assert "first difference: step 2, metrics, train/loss: " in text
    assert text.rstrip().endswith(f"{rows[2]['train/loss']!r} in B, 1 ulp of fp64")


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


def test_what_only_one_run_kept_is_named(two, capsys):
    """A shorter list of samples, no rollouts: less is compared, and that is said."""
    shutil.rmtree(two[1] / "rollouts")
    file = two[1] / "samples.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    code, text = diff(capsys, *two)
    assert code == 0
    assert "not compared: rollouts that only A has, of 6 steps from 1 to 6" in text
    assert "not compared: samples that only A has, of step 6" in text


def test_a_character_and_a_missing_metric(two, capsys):
    """Evaluation comes after the checkpoint of a step; without rollouts, a hint how to get them."""
    file = two[1] / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[5]["completion"] = rows[5]["completion"][:1] + "X"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = two[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("eval/reward_mean", "eval/renamed"))
    shutil.rmtree(two[1] / "rollouts")
    code, text = diff(capsys, *two, "--all")
    assert code == 1
    first, hint, *_ = text[text.index("first difference") :].splitlines()
    assert first.startswith("first difference: step 0, metrics, eval/reward_mean: ")
    assert first.endswith(", only in A")
    assert "logger.save_rollouts=true" in hint
    assert "then: step 3, samples, row 1, completion, character 1: " in text


def test_another_optimizer_setting(pair, capsys):
    """A key that explains the difference is shown; one that cannot change a bit is not."""
    pair.train("lr", SAVED, "trainer.optimizer.lr=2e-2", "engine.page_size=16")
    capsys.readouterr()
    code, text = diff(capsys, pair.folder / "one", pair.folder / "lr")
    assert code == 1
    lines = text.splitlines()
    assert lines[1] == "config: trainer.optimizer.lr: 0.01 in A, 0.02 in B"
    start = "first difference: step 1, metrics, train/learning_rate: 0.01 in A, 0.02 in B"
    assert lines[-1] == start
    for folder in ("one", "lr"):
        assert (pair.folder / folder / "rollouts" / "step_00000001.safetensors").exists()
    more = diff(capsys, pair.folder / "one", pair.folder / "lr", "all=true")[1]
    assert "then: step 2, rollout, sample " in more


def test_other_data_model_and_numerics_explain_a_difference(two, capsys):
    """As the newest checkpoints say: they stand before the first place, and are none."""
    path = list_checkpoints(two[1] / "checkpoints")[-1].path / MANIFEST
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != "digest"}
    content["contents"]["training records"] = "9 x 0123456789abcdef"
    content["model"]["norm_eps"] = 0.5
    content["numerics"]["tp_size"] = 2
    path.write_text(manifest_text(content))
    code, text = diff(capsys, *two)
    assert code == 0
    assert re.search("numerics: norm_eps: 1e-06 in A, 0.5 in B", text)
    assert re.search(
        "numerics: training records: '50 x .{16}' in A, '9 x 0123456789abcdef' in B", text
    )
    assert "numerics: tp_size: 1 in A, 2 in B" in text
    assert text.count("numerics: ") == 3


def test_any_folder_name(two, capsys):
    """What a shell passes on reaches the command as it is, by place or by key."""
    odd = two[1].rename(two[1].with_name("it's = [b], {c}\\"))
    assert diff(capsys, two[0], odd)[0] == 0
    assert diff(capsys, f"b={two[0]}", odd)[0] == 0


def sample(sample_id=3, prompt=(5, 6), tokens=(7, 8), logprobs=(-0.5, -0.25), reward=1.0):
    ids = torch.tensor(prompt), torch.tensor(tokens, dtype=torch.int32)
    return SavedSample(sample_id, *ids, torch.tensor(logprobs), reward)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (sample(sample_id=4), "sample 1 (id 0x3), sample_id: 0x4 in B"),
        (sample(prompt=(5, 9)), "sample 1 (id 0x3), prompt_ids: [5, 6] in A, [5, 9] in B"),
        (
            sample(tokens=(7, 9)),
            "sample 1 (id 0x3), token 1: 8 with log-prob -0.25 in A, 9 with log-prob -0.25 in B, "
            "0 ulps",
        ),
        (
            sample(tokens=(7,), logprobs=(-0.5,)),
            "sample 1 (id 0x3), ends after 2 tokens in A, 1 in B",
        ),
        (sample(reward=2.0), "sample 1 (id 0x3), reward: 1.0 in A, 2.0 in B"),
        (None, "2 samples in A, 1 in B"),
    ],
    ids=["sample id", "prompt", "token", "length", "reward", "number"],
)
def test_every_part_of_a_rollout_counts(other, message):
    found = list(rollout_differences([sample()] * 2, [sample()] + [other] * (other is not None)))
    assert [text.partition(", 4503599627370496 ulps")[0] for text in found] == [message]
    assert list(rollout_differences([sample()] * 2, [sample()] * 2)) == []


def test_a_summary_and_what_only_the_second_run_has_count(two, capsys):
    """The digest of the weights stands there; a metric that one run lacks is not skipped; seconds
    are."""
    file = two[1] / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps(summary | {"perf/wall_s": 5.0}))
    assert diff(capsys, *two)[0] == 0
    file.write_text(json.dumps(summary | {"weights_digest": "0" * 16, "more": 1}))
    code, text = diff(capsys, *two, "--all")
    assert code == 1
    digest = summary["weights_digest"]
    assert f"first difference: summary: weights_digest: '{digest}' in A, '{'0' * 16}' in B" in text
    assert "then: summary: more: 1, only in B" in text
    file.unlink()
    assert "first difference: summary: only A is finished" in diff(capsys, *two)[1]


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


def damage_rollout(folder):
    file = sorted((folder / "rollouts").iterdir())[1]
    file.write_bytes(file.read_bytes()[:-3])


def damage_checkpoint(folder):
    [file] = (folder / "checkpoints" / "step_00000004").glob("*.pt")
    file.write_bytes(file.read_bytes()[:5000])


def damage_metrics(folder):
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_rollout, "step_00000002.safetensors is damaged"),
        (damage_checkpoint, "rank_00000.pt is damaged"),
        (damage_metrics, "metrics.jsonl, line 2 is damaged"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), "holds no step yet"),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), "is no configuration"),
        (lambda folder: (folder / "config.yaml").write_text("model: tiny"), "is no configuration"),
        (lambda folder: (folder / "summary.json").write_text("{"), "summary.json is damaged"),
    ],
)
def test_a_damaged_folder_is_no_difference(two, damage, message, capsys):
    """Exit code 2 and one line on stderr."""
    damage(two[1])
    assert main(["diff", *map(str, two)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("samebit diff: ")
    assert message in error[0]


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
    far = torch.tensor([3.0], dtype=torch.float64)
    assert distance(far, -far).max_ulps == 2 * 0x4008 << 48  # beyond int64
    tiny = torch.tensor(2.0**-133, dtype=torch.bfloat16)  # the smallest
    assert distance(tiny, -tiny) == Distance(1, (), 2, 2)
