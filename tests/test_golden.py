"""Golden values: equal inputs give what they always gave.

Every other test holds one side of the code against another. These notice what changes on all sides
at once: another position in the noise, another order of the samples, another rate.
"""

import copy

import pytest
from golden import program, stored

RUNS = ("engine", "sampling", "grpo", "sft")


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Of this machine's CPU."""
    return program.run(tmp_path_factory.mktemp("golden"), "cpu")


@pytest.mark.parametrize("run", RUNS)
def test_golden_values(values, run):
    """To the bit under a profile whose values are kept; on another CPU model tokens, lengths and
    counts are equal and floats lie close."""
    profile = stored.profile_of("cpu")
    exact = stored.file_of(profile)
    files = [exact] if exact.exists() else stored.same_contract(profile)
    assert files, f"no values are kept for {profile}: run python tests/golden/make.py"
    for file in files:
        found = stored.differences(values[run], stored.read(file)[run], file == exact, run)
        assert not found, f"{len(found)} values are not those of {file}:\n" + "\n".join(found[:20])


@pytest.mark.parametrize("run", ["grpo", "sft"])
def test_a_resumed_run_is_the_uninterrupted_one(values, run):
    """On any machine, to the bit."""
    assert values[run]["resumed"] == values[run]["summary"]
    assert values[run]["summary"]["weights_digest"] == values[run]["checkpoints"]["2"]["weights"]


def test_learning_rates_by_hand(values):
    """Of the last update of each step: two steps of two updates, and two of one."""

    def rates(run):
        rows = values[run]["metrics"]
        return [float.fromhex(r["train/learning_rate"]) for r in rows if "train/loss" in r]

    assert rates("grpo") == pytest.approx([1e-3 - 9e-4 / 4, 1e-3 - 9e-4 * 3 / 4], rel=1e-12)
    assert rates("sft") == pytest.approx([1e-3, 1e-4 + 9e-4 / 2], rel=1e-12)


@pytest.mark.parametrize("exact", [True, False], ids=["same profile", "other CPU"])
def test_a_changed_value_is_found(values, exact):
    """In a token, an end, a length and a float; one ulp counts under the same profile alone."""
    for path, change in (
        (("sampling", "top_k", 0, "tokens", 3), lambda token: token + 1),
        (("sampling", "stop tokens", 0, "end"), lambda _: "length"),
        (("engine", "qwen3", "score", 0), lambda scores: scores[:-1]),
        (("grpo", "metrics", 1, "train/grad_norm"), lambda x: (float.fromhex(x) * 1.001).hex()),
        (("sft", "checkpoints", "1", "first moments"), lambda _: {}),
    ):
        assert len(stored.differences(changed(values, path, change), values, exact)) == 1, path
    for path, change in (
        (("grpo", "summary", "weights_digest"), lambda text: f"{text[:-1]}?"),
        (("engine", "llama", "score", 0, 0), lambda x: (float.fromhex(x) * (1 + 2**-23)).hex()),
    ):
        found = stored.differences(changed(values, path, change), values, exact)
        assert len(found) == (1 if exact else 0), path


def changed(values, path, change):
    """A copy with one value changed."""
    copied = copy.deepcopy(values)
    *parents, last = path
    place = copied
    for key in parents:
        place = place[key]
    place[last] = change(place[last])
    return copied


@pytest.mark.gpu
def test_golden_values_of_this_gpu(tmp_path):
    """The same program on a GPU, whose values are kept for each architecture."""
    profile = stored.profile_of("cuda")
    file = stored.file_of(profile)
    message = f"no values are kept for {profile}: run python tests/golden/make.py device=cuda"
    assert file.exists(), message
    found = stored.differences(program.run(tmp_path, "cuda"), stored.read(file))
    assert not found, f"{len(found)} values are not those of {file}:\n" + "\n".join(found[:20])
