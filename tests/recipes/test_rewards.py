"""Rewards: what they score, and the errors that name a bad one."""

import functools
import json
import math
import re
import signal
import time

import numpy as np
import pytest

from samebit.recipes.data import rewards
from samebit.recipes.data.reward_config import RewardConfig
from samebit.recipes.data.reward_pool import load_reward
from samebit.recipes.data.rewards import RewardError, bind_reward, score
from samebit.recipes.data.tasks.base import DataConfig, Problem
from samebit.recipes.data.tasks.registry import load_datasets


def problem(label: str, index: int = 0) -> Problem:
    return Problem(index=index, prompt="?", label=label, metadata={})


@pytest.fixture(scope="module")
def one():
    """one(name, text, label): a score; workers are started once."""
    in_process = ("exact_match", "number_match")

    @functools.cache
    def load(name):
        return load_reward(RewardConfig(name=name, num_workers=None if name in in_process else 1))

    return lambda name, text, label: load(name)(text, problem(label))


def test_exact_match(one):
    assert one("exact_match", " 12\n", "12") == 1.0
    assert [one("exact_match", text, "12") for text in ("12.", "11", "13", "1")] == [0.0] * 4


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("so 5 - 3 is 2.", "2", 1.0),
        ("2 then 3", "2", 0.0),
        ("it is -1,234.50 dollars", "-1234.5", 1.0),
        ("x = \u22127", "-7", 1.0),
        ("10-5", "5", 1.0),
        ("10-5", "-5", 0.0),
        ("(1)-2", "2", 1.0),
        (".5", "0.50", 1.0),
        ("0.1", "0.10000000000000000001", 0.0),
        ("1,2345", "12345", 0.0),
        ("thinking #### 72", "some work\n#### 72", 1.0),
        ("no number", "1", 0.0),
        ("", "1", 0.0),
        ("9" * 5000, "1", 0.0),
        ("5", "1e-05", 0.0),
        ("0.00001", "1e-05", 1.0),
        ("it is 1e5", "5", 0.0),
        ("2.5E+3", "2,500", 1.0),
        ("1e99999999999", "1", 0.0),
        ("3 eggs", "3", 1.0),
        ("1e1000", "10e999", 1.0),
        ("1e-1000", "0.1e-999", 1.0),
        ("1e1001", "1", 0.0),
    ],
)
def test_number_match(one, text, label, expected):
    assert one("number_match", text, label) == expected


@pytest.mark.parametrize("label", ["", "none", "1/2", "10^3", "2**3", "x/{2", "1e99999", "1e1001"])
def test_labels_that_number_match_would_misread(label):
    with pytest.raises(RewardError, match=f"ValueError: the label '{re.escape(label)}' "):
        score(load_reward(RewardConfig(name="number_match")), ["3"], [problem(label)])


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("the answer is $\\frac{1}{2}$", "0.5", 1.0),
        ("so \\boxed{2x+1}", "1+2x", 1.0),
        ("so \\boxed{2x+1}", "$2x+2$", 0.0),
        ("nothing here", "3", 0.0),
        ("so $(5, \\infty)$", "x > 5", 1.0),  # not the other way around
        ("so $x > 5$", "(5, \\infty)", 0.0),
    ],
)
def test_math_verify(one, text, label, expected):
    assert one("math_verify", text, label) == expected


def test_math_verify_counts_what_it_takes_of_the_cpu(monkeypatch):
    """Not what others take of the machine, and nothing in it can catch the end."""
    problem_of = problem("2")

    def slowly(text, parsing_timeout):
        time.sleep(1.2)
        return ["2"]

    def stubbornly(text, parsing_timeout):
        for _ in range(3):
            try:
                while True:
                    pass
            except BaseException:  # noqa: BLE001, S112 (others' code may)
                continue
        return ["2"]

    for parse, expected in ((slowly, 1.0), (stubbornly, 0.0), (slowly, 1.0)):
        package = parse, lambda gold, answer, timeout_seconds: gold == answer
        monkeypatch.setattr(rewards, "_math_verify_package", lambda found=package: found)
        monkeypatch.setattr(rewards, "_gold", lambda label: [label])
        assert rewards.math_verify("2", problem_of, timeout_s=1) == expected
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_reasoning_gym_uses_the_scorer_of_the_task():
    train, _ = load_datasets(DataConfig(task="reasoning_gym/chain_sum", size=4, eval_size=1))
    reward = load_reward(RewardConfig(name="reasoning_gym"))
    assert reward(f" {train[0].label}\n", train[0]) == 1.0
    assert reward("wrong", train[0]) < 0.1
    tagged = load_reward(RewardConfig(name="reasoning_gym", args={"answer_tag": "answer"}))
    text = f"<answer>no</answer> or <answer> {train[1].label}\n</answer>"
    assert tagged(text, train[1]) == 1.0
    assert tagged(train[1].label, train[1]) == 0.0


@pytest.mark.parametrize("tag", ["answer", "a", "<", None])
def test_a_tag_that_reasoning_gym_takes(tag):
    assert bind_reward("reasoning_gym", {"answer_tag": tag}).args == {"answer_tag": tag}


@pytest.mark.parametrize("tag", ["", 3, ["answer"]])
def test_a_tag_that_reasoning_gym_does_not_take(tag):
    message = re.escape(f"reward.args.answer_tag is {tag!r}; give the name of a tag")
    with pytest.raises(ValueError, match=message):
        bind_reward("reasoning_gym", {"answer_tag": tag})


def test_reasoning_gym_scores_without_a_single_answer():
    train, _ = load_datasets(DataConfig(task="reasoning_gym/graph_color", size=2, eval_size=1))
    assert train[0].label == ""
    coloring = train[0].metadata["entry"]["metadata"]["possible_answer"]
    reward = load_reward(RewardConfig(name="reasoning_gym"))
    assert reward(json.dumps(coloring), train[0]) == 1.0
    assert reward("{}", train[0]) < 1.0


def test_reasoning_gym_scores_zero_where_the_scorer_fails_on_the_text():
    config = DataConfig(task="reasoning_gym/prime_factorization", size=2, eval_size=1)
    train, _ = load_datasets(config)
    reward = load_reward(RewardConfig(name="reasoning_gym"))
    assert reward("no factors", train[0]) == 0.0
    assert reward(train[0].label, train[0]) == 1.0


def test_users_function_with_arguments(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(text, problem, *, scale=1):\n    return len(text) * scale\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_reward(RewardConfig(name="my_rewards:length", args={"scale": 0.5}))
    texts, problems = ["ab", "abcd"], [problem("", 0), problem("", 1)]
    assert score(reward, texts, problems) == [1.0, 2.0]
    with pytest.raises(ValueError, match="reward.args is {'scal': 1}.*'scal'"):
        load_reward(RewardConfig(name="my_rewards:length", args={"scal": 1}))


def test_a_function_that_does_not_say_what_it_takes_is_called():
    """As some built-in ones: that it takes no text is an error of the reward, once it scores."""
    reward = load_reward(RewardConfig(name="math:hypot"))
    with pytest.raises(RewardError, match="must be real number"):
        score(reward, ["3"], [problem("3")])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig(name="exact"), "reward.name is 'exact'; give one of exact_match, number_m"),
        (RewardConfig(name="no_such_module:f"), "No module named .*; put its folder on PYTHONPATH"),
        (RewardConfig(name="math:no_such"), "cannot be imported"),
        (RewardConfig(name="math:pi"), "'math:pi', a float; give a function"),
        (RewardConfig(name="math:fsum"), "is called as reward.text, problem, .*too many"),
        (RewardConfig(name="exact_match", args={"x": 1}), "reward.args is {'x': 1}.*'x'"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        load_reward(config)


def test_scores_come_in_order():
    reward = load_reward(RewardConfig(name="number_match"))
    texts = [str(i % 3) for i in range(12)]
    problems = [problem("1", i) for i in range(12)]
    expected = [float(i % 3 == 1) for i in range(12)]
    assert score(reward, texts, problems) == expected
    with pytest.raises(RewardError, match="problem 12.*ValueError: the label 'x'") as caught:
        score(reward, [*texts, "1"], [*problems, problem("x", 12)])
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_reward_that_raises_is_named_and_chained():
    def fragile(text: str, problem: Problem) -> float:
        return 1 / len(text)

    with pytest.raises(RewardError, match="fragile.*problem 7, completion ''.*ZeroDiv") as caught:
        score(fragile, ["a", ""], [problem("", 3), problem("", 7)])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1", np.float32("nan")])
def test_a_reward_that_is_no_finite_number_is_refused(value):
    text = "x" * 10_000
    with pytest.raises(RewardError, match="return a finite number") as caught:
        score(lambda text, problem: value, [text], [problem("")])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a" * 200, "a" * 200), ("a" * 100 + "-" + "b" * 100, "a" * 100 + " ... " + "b" * 100)],
)
def test_an_error_shows_the_ends_of_a_long_text(text, shown):
    with pytest.raises(RewardError) as caught:
        score(lambda text, problem: None, [text], [problem("")])
    assert f"completion '{shown}' returned None" in str(caught.value)


def test_other_numbers_become_floats():
    for value in (True, 1, np.float32(1)):
        scores = score(lambda text, problem, value=value: value, ["x"], [problem("")])
        assert scores == [1.0]
        assert type(scores[0]) is float


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 completions for 1 problems"):
        score(lambda text, problem: 0.0, ["a", "b"], [problem("")])
