"""Rewards: functions of a completion's text and its problem, and scoring a batch with one."""

import functools
import importlib
import inspect
import json
import math
import numbers
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from samebit.recipes.tasks.base import Problem

Reward = Callable[[str, Problem], float]

NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+])?"  # after a word or a bracket a sign is an operator: "5-3", "(1)-2"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)

# What the package's scorers raise on a text they cannot parse (some parse without a check).
UNPARSABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError)


class RewardError(RuntimeError):
    """A reward raised, or returned something that is no finite number."""


@dataclass(kw_only=True)
class RewardConfig:
    """How a completion is scored."""

    name: str = "exact_match"
    """`exact_match`, `number_match`, `math_verify`, `reasoning_gym`, or your `module:function`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward."""


@dataclass(frozen=True, kw_only=True)
class BoundReward:
    """A reward function with its arguments. Pickles by name, so worker processes can run it."""

    name: str
    function: Callable[..., Any]
    args: dict[str, Any]

    def __call__(self, text: str, problem: Problem) -> float:
        return self.function(text, problem, **self.args)


def load_reward(config: RewardConfig) -> Reward:
    """The reward that a config names.

    Raises ValueError for an unknown name (listing the choices), a function that cannot be
    imported, or arguments that it does not take.
    """
    function = REWARDS.get(config.name) or _import_reward(config.name)
    try:
        inspect.signature(function).bind("", None, **config.args)
    except TypeError as error:
        raise ValueError(
            f"reward.args is {config.args}, but the reward {config.name!r} is called as "
            f"reward(text, problem, **args): {error}"
        ) from error
    return BoundReward(name=config.name, function=function, args=dict(config.args))


def score(reward: Reward, texts: Sequence[str], problems: Sequence[Problem]) -> list[float]:
    """The reward of each completion, in order.

    Raises RewardError, naming the reward, the problem and the completion, where the reward raises
    or returns something that is no finite number.
    """
    if len(texts) != len(problems):
        raise ValueError(f"{len(texts)} completions for {len(problems)} problems; give one each")
    return [_score(reward, text, problem) for text, problem in zip(texts, problems, strict=True)]


def exact_match(text: str, problem: Problem) -> float:
    """1 where the text, without surrounding space, is the label."""
    return float(text.strip() == problem.label.strip())


def number_match(text: str, problem: Problem) -> float:
    """1 where the last number in the text equals the label's last number, exactly.

    Understands signs, thousands commas and decimals ("-1,234.50"); not exponents or fractions.
    Raises ValueError for a label without a number.
    """
    expected = _last_number(problem.label)
    if expected is None:
        raise ValueError(f"the label {problem.label!r} holds no number; use another reward")
    return float(_last_number(text) == expected)


def math_verify(text: str, problem: Problem, *, timeout_s: int = 5) -> float:
    """1 where the package math-verify finds the text's answer equal to the label.

    A label without LaTeX delimiters is read as LaTeX. An answer that takes longer than `timeout_s`
    seconds to parse or compare scores 0: the one case where a score depends on the machine. The
    package's timer needs the main thread of its process. Raises ValueError for a label that
    cannot be parsed, ImportError without the package.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            "the reward math_verify needs a package: pip install math-verify"
        ) from error
    label = problem.label
    delimited = any(mark in label for mark in ("$", "\\boxed", "\\(", "\\["))
    gold = parse(label if delimited else f"${label}$", parsing_timeout=timeout_s)
    if not gold:
        raise ValueError(f"math-verify cannot parse the label {label!r}; give LaTeX or a number")
    answer = parse(text, parsing_timeout=timeout_s)
    return float(verify(gold, answer, timeout_seconds=timeout_s))


def reasoning_gym(text: str, problem: Problem, *, answer_tag: str | None = None) -> float:
    """The score of the reasoning_gym task that the problem comes from, from 0 to 1.

    With `answer_tag`, the answer is what the last <tag>...</tag> holds, and a text without one
    scores 0. A text on which the task's scorer fails scores 0. Some scorers evaluate the answer
    as a Python expression: run those tasks only where the model's output may be executed.
    Raises ValueError for a problem of another kind of task.
    """
    if not {"task", "args", "entry"} <= problem.metadata.keys():
        raise ValueError(
            "the reward reasoning_gym scores problems of data.task reasoning_gym/<name> only; this "
            f"one has the metadata {sorted(problem.metadata)}"
        )
    scorer = _scorer(problem.metadata["task"], json.dumps(problem.metadata["args"], sort_keys=True))
    answer: str | None = text.strip()
    if answer_tag is not None:
        found = re.findall(rf"<{answer_tag}>(.*?)</{answer_tag}>", text, flags=re.DOTALL)
        answer = found[-1].strip() if found else None
    try:
        return float(scorer.score_answer(answer, problem.metadata["entry"]))
    except UNPARSABLE:
        return 0.0


REWARDS: dict[str, Callable[..., float]] = {
    "exact_match": exact_match,
    "number_match": number_match,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
}


def _import_reward(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(
            f"reward.name is {name!r}; give one of {', '.join(REWARDS)}, or module:function"
        )
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward.name is {name!r}, which cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"reward.name is {name!r}, a {type(function).__name__}; give a function")
    return function


def _score(reward: Reward, text: str, problem: Problem) -> float:
    name = getattr(reward, "name", None) or getattr(reward, "__qualname__", repr(reward))
    completion = repr(text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}")
    where = f"the reward {name!r} on problem {problem.index}, completion {completion}"
    try:
        value: Any = reward(text, problem)
    except Exception as error:
        raise RewardError(
            f"{where} raised {type(error).__name__}: {error} (SAMEBIT_TRACEBACK=1 shows where)"
        ) from error
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RewardError(f"{where} returned {value!r:.80}; return a finite number")
    return float(value)


def _last_number(text: str) -> Decimal | None:
    numbers_found = NUMBER.findall(text.replace("\u2212", "-"))  # the typographic minus sign
    return Decimal(numbers_found[-1].replace(",", "")) if numbers_found else None


@functools.cache
def _scorer(task: str, args: str) -> Any:
    from samebit.recipes.tasks.reasoning_gym import make_source

    return make_source(task, json.loads(args), seed=0, size=1)
