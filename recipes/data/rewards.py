"""Rewards: functions of a completion's text and its problem, and scoring a batch with one."""

import functools
import inspect
import json
import math
import numbers
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from samebit.kernels.named import import_named
from samebit.recipes.data.cpu_limit import OverLimit, cpu_limit
from samebit.recipes.data.tasks.base import Problem

Reward = Callable[[str, Problem], float]
Poll = Callable[[], object]
"""Called again and again while something else works; it may raise, which ends the work."""

NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+])?"  # after a word or a bracket a sign is an operator: "5-3", "(1)-2"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+(?!\w))?"
)
# Before a number that is only a part of another one: "1/2", "10^3".
PART = re.compile(r"[\w)}\]]\s*(?:/|\^|\*\*)\s*[({]?\s*$")
LABEL_LIMIT_S = 30  # of the CPU, that math-verify may take for a label: more than any needs
_NEVER_S = 10**6  # math-verify's own timer, which counts what others take of the machine too
IN_PROCESS = ("exact_match", "number_match")
"""Rewards that only compare texts: they need no process of their own."""
MAX_EXPONENT = 1000  # of ten: no comparison of two numbers may take long

# What the package's scorers raise on a text they cannot parse (some parse without a check).
UNPARSABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError)


class RewardError(RuntimeError):
    """A reward raised, ended or outlived its process, or returned what is no finite number."""


@dataclass(frozen=True, kw_only=True)
class BoundReward:
    """Runs a reward function with its arguments in the process that calls it."""

    name: str
    function: Callable[..., Any]
    args: dict[str, Any]

    def __call__(self, text: Any, problem: Any) -> Any:
        """Call it with a completion and its problem, or with lists of them."""
        return self.function(text, problem, **self.args)

    @property
    def is_async(self) -> bool:
        """Say whether a call has to be awaited."""
        called = (self.function, type(self.function).__call__)  # or an object that is called
        return any(map(inspect.iscoroutinefunction, called))

    @property
    def has_check(self) -> bool:
        """Say whether `check_problem` can find anything."""
        return self._check is not None

    @property
    def _check(self) -> Callable[[Problem], object] | None:
        return CHECKS.get(self.name) or getattr(self.function, "check_problem", None)

    def check_problem(self, problem: Problem) -> None:
        """Raise ValueError for a problem that the function says it cannot use.

        A function says so by an attribute `check_problem`, itself a function of the problem, which
        raises ValueError too; TypeError for one that returns something instead.
        """
        if self._check is None:
            return
        found = self._check(problem)
        if found is not None and self.name not in CHECKS:
            raise TypeError(
                f"check_problem returned {found!r:.80}; it must raise ValueError for a problem "
                "that cannot be used, and else return None"
            )

    def check(self, problems: Sequence[Problem], poll: Poll) -> list[str]:
        """Return for each problem what is wrong with it, or an empty text."""
        poll()
        return [_fault(self.check_problem, problem) for problem in problems]

    def score(self, texts: Sequence[str], problems: Sequence[Problem], poll: Poll) -> list[float]:
        """Return the rewards in order; see the function score."""
        return [_score(self, text, p) for text, p in zip(texts, problems, strict=True)]

    def close(self) -> None:
        """Do nothing: there is nothing to let go of."""


def bind_reward(
    name: str, args: dict[str, Any], key: str = "reward", *, batched: bool = False
) -> BoundReward:
    """Return the function that a name means, with checked arguments; raises as load_reward does.

    key: the section of the configuration that errors name; batched: it is called with lists.
    """
    function = REWARDS.get(name) or _import_reward(name, key)
    try:
        inspect.signature(function).bind("", None, **args)
    except TypeError as error:
        called = "reward(texts, problems, **args)" if batched else "reward(text, problem, **args)"
        raise ValueError(
            f"{key}.args is {args}, but the reward {name!r} is called as {called}: {error}"
        ) from error
    except ValueError:  # some built-in functions do not say what they take
        pass
    for arg, (is_right, meaning) in ARGS.get(name, {}).items():
        if arg in args and not is_right(args[arg]):
            raise ValueError(f"{key}.args.{arg} is {args[arg]!r}; give {meaning}")
    if function is math_verify:
        _math_verify_package()
    return BoundReward(name=name, function=function, args=dict(args))


class Scorer(Protocol):
    """Scores completions by one function, wherever that runs."""

    @property
    def name(self) -> str:
        """Errors call it this."""

    def check(self, problems: Sequence[Problem], poll: Poll) -> list[str]:
        """Return for each problem what is wrong with it, or an empty text."""

    def score(self, texts: Sequence[str], problems: Sequence[Problem], poll: Poll) -> list[float]:
        """Return the rewards in order; see the function score."""

    def close(self) -> None:
        """Let go of what it runs in. A second call does nothing."""


def score(
    reward: Reward | Scorer,
    texts: Sequence[str],
    problems: Sequence[Problem],
    poll: Poll = lambda: None,
) -> list[float]:
    """Return the reward of each completion, in order; `poll` is called while others compute them.

    Raises RewardError, naming the reward, the problem and the completion, where the reward raises,
    ends or outlives its process, or returns something that is no finite number.
    """
    if len(texts) != len(problems):
        raise ValueError(f"{len(texts)} completions for {len(problems)} problems; give one each")
    if not callable(reward) or hasattr(reward, "score"):
        return reward.score(texts, problems, poll)
    return [_score(reward, text, problem) for text, problem in zip(texts, problems, strict=True)]


def finite(value: Any) -> float | None:
    """Return a finite number as a float, and None for anything else."""
    try:
        return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None
    except OverflowError:  # a whole number that no float can hold
        return None


def describe(reward: str, text: str, problem: Problem) -> str:
    """Return what an error says of a sample."""
    completion = repr(text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}")
    where = f" ({problem.where})" if problem.where else ""
    return f"the reward {reward!r} on problem {problem.index}{where}, completion {completion}"


def describe_batch(reward: str, problems: Sequence[Problem]) -> str:
    """Return what an error says of a call that was given several samples."""
    first, last = problems[0], problems[-1]
    return f"the reward {reward!r} on {len(problems)} completions, of {first.name} to {last.name},"


def exact_match(text: str, problem: Problem) -> float:
    """Return 1 where the text, without surrounding space, is the label, and else 0."""
    return float(text.strip() == problem.label.strip())


def number_match(text: str, problem: Problem) -> float:
    """Return 1 where the last number in the text equals the label's, exactly, and else 0.

    Understands signs, thousands commas, decimals and exponents ("-1,234.50", "1e-5"); not
    fractions. Raises ValueError for a label without a number, or whose last one is part of a
    fraction or a power.
    """
    return float(_last_number(text) == _label_number(problem))


def math_verify(text: str, problem: Problem, *, timeout_s: int = 5) -> float:
    """Return 1 where math-verify finds the text's answer equal to the label, and else 0.

    A label without LaTeX delimiters is read as LaTeX. An answer that takes `timeout_s` seconds of
    the CPU to parse and compare scores 0: the one case where a score depends on the machine. The
    timer needs the main thread of its process. Raises ValueError for a label that cannot be parsed,
    ImportError without the package.
    """
    parse, verify = _math_verify_package()
    gold = _gold(problem.label)
    try:
        with cpu_limit(timeout_s):
            answer = parse(text, parsing_timeout=_NEVER_S)
            return float(verify(gold, answer, timeout_seconds=_NEVER_S))
    except OverLimit:
        return 0.0


def reasoning_gym(text: str, problem: Problem, *, answer_tag: str | None = None) -> float:
    """Return the score, from 0 to 1, of the reasoning_gym task that the problem comes from.

    With `answer_tag`, the answer is what the last <tag>...</tag> holds, and a text without one
    scores 0. A text on which the task's scorer fails scores 0. Some scorers evaluate the answer
    as a Python expression: run those tasks only where the model's output may be executed; an
    answer that never ends is an error once reward.timeout_s is over.
    Raises ValueError for a problem of another kind of task.
    """
    _check_entry(problem)
    scorer = _scorer(problem.metadata["task"], json.dumps(problem.metadata["args"], sort_keys=True))
    answer: str | None = text.strip()
    if answer_tag is not None:
        tag = re.escape(answer_tag)
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
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


def _label_number(problem: Problem) -> Decimal:
    label = problem.label
    number = _last_number(label)
    *_, last = [None, *NUMBER.finditer(_plain_minus(label))]
    if last is None:
        raise ValueError(f"the label {label!r:.80} holds no number; use another reward")
    if number is None:
        raise ValueError(
            f"the label {label!r:.80} ends in {last.group():.80}, whose exponent number_match does "
            f"not read; give one from -{MAX_EXPONENT} to {MAX_EXPONENT}"
        )
    if PART.search(label[: last.start()]):
        raise ValueError(
            f"the label {label!r:.80} ends in a fraction or a power, of which number_match would "
            f"read {last.group()}; write a decimal, or use math_verify"
        )
    return number


def _check_label(problem: Problem) -> None:
    if not problem.label:
        raise ValueError("its label is empty, and exact_match compares with it; use another reward")


def _check_math(problem: Problem) -> None:
    _gold(problem.label)


def _check_entry(problem: Problem) -> None:
    if not {"task", "args", "entry"} <= problem.metadata.keys():
        raise ValueError(
            "the reward reasoning_gym scores problems of data.task reasoning_gym/<name> only; this "
            f"one has the metadata {sorted(problem.metadata)}"
        )


# What each of our functions asks of a problem, and of its arguments.
CHECKS: dict[str, Callable[[Problem], object]] = {
    "exact_match": _check_label,
    "number_match": _label_number,
    "math_verify": _check_math,
    "reasoning_gym": _check_entry,
}
ARGS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "math_verify": {
        "timeout_s": (lambda value: type(value) is int and value >= 1, "whole seconds, at least 1")
    },
    "reasoning_gym": {
        "answer_tag": (
            lambda value: value is None or (isinstance(value, str) and value != ""),
            "the name of a tag, as in answer",
        )
    },
}


def _import_reward(name: str, key: str) -> Callable[..., Any]:
    function = import_named(name, f"{key}.name")
    if not callable(function):
        raise ValueError(f"{key}.name is {name!r}, a {type(function).__name__}; give a function")
    return function


def _fault(check: Callable[[Problem], object], problem: Problem) -> str:
    try:
        check(problem)
    except ValueError as error:
        return str(error)
    return ""


def _score(reward: Reward, text: str, problem: Problem) -> float:
    name = str(getattr(reward, "name", None) or getattr(reward, "__qualname__", reward))
    where = describe(name, text, problem)
    try:
        value: Any = reward(text, problem)
    except BaseException as error:
        raise RewardError(
            f"{where} raised {type(error).__name__}: {error} (SAMEBIT_TRACEBACK=1 shows where)"
        ) from error
    if (number := finite(value)) is None:
        raise RewardError(f"{where} returned {value!r:.80}; return a finite number")
    return number


def _plain_minus(text: str) -> str:
    return text.replace("\u2212", "-")  # the typographic minus sign


def _last_number(text: str) -> Decimal | None:
    """None also where the last number is too large or too small to be meant."""
    numbers_found = NUMBER.findall(_plain_minus(text))
    if not numbers_found:
        return None
    mantissa, _, exponent = numbers_found[-1].replace(",", "").lower().partition("e")
    if len(exponent) > 5 or abs(int(exponent or 0)) > MAX_EXPONENT:
        return None
    return Decimal(f"{mantissa}e{exponent or 0}")


def _math_verify_package() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            "the reward math_verify needs the package math-verify: pip install math-verify"
        ) from error
    return parse, verify


@functools.lru_cache(maxsize=100_000)
def _gold(label: str) -> Any:
    """A label as math-verify reads it; ValueError if it cannot."""
    parse, _ = _math_verify_package()
    delimited = any(mark in label for mark in ("$", "\\boxed", "\\(", "\\["))
    gold = None
    with suppress(OverLimit), cpu_limit(LABEL_LIMIT_S):
        gold = parse(label if delimited else f"${label}$", parsing_timeout=_NEVER_S)
    if not gold:
        raise ValueError(f"math-verify cannot parse the label {label!r}; give LaTeX or a number")
    return gold


@functools.cache
def _scorer(task: str, args: str) -> Any:
    from samebit.recipes.data.tasks.reasoning_gym import make_source

    return make_source(task, json.loads(args), seed=0, size=1)
