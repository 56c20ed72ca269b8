"""A worked example of turns and tools: sums of reasoning-gym, for which the model has a calculator.

`configs/experiment/grpo/smollm2_calculator.yaml` trains on it. All three functions are named there
as module:function, as functions of your own are.
"""

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from samebit.recipes.data.conversation import Conversation, GenerateRequest, TurnDrawer
from samebit.recipes.data.rewards import CHECKS, number_match
from samebit.recipes.data.tasks.base import DataConfig, Dataset, Problem
from samebit.recipes.data.tasks.reasoning_gym import load
from samebit.rollout.types import SamplingParams
from samebit.trainer.types import Sample

INSTRUCTION = (
    "You have a calculator. Write calc(12 + 7) and nothing else, and you are told the result. Then "
    "write the answer as a number."
)
RESULT = "The calculator says"
MOST_CHARACTERS = 200  # of an expression
MOST_DIGITS = 1000  # of a number in it or of what comes of it

_CALL = re.compile(r"calc\(([^\n]*)\)")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def problems(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return the splits of a task of reasoning-gym, each problem told of the calculator.

    data.args.task is its name, chain_sum if unset; the other data.args are the task's. Raises as
    that task does.
    """
    args = dict(config.args)
    task = args.pop("task", "chain_sum")
    train, held_out = load(replace(config, task=f"reasoning_gym/{task}", args=args))
    return Told(train), [told(held_out[i]) for i in range(len(held_out))]


class Told:
    """Gives problems as they are generated, with the instruction before each."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Problem:
        return told(self._dataset[index])


def told(problem: Problem) -> Problem:
    """Return a problem as a chat that begins with what there is to call."""
    question = {"role": "user", "content": f"{problem.prompt}"}
    return replace(problem, prompt=[{"role": "system", "content": INSTRUCTION}, question])


async def generate(
    engine: TurnDrawer, request: GenerateRequest, sampling_params: SamplingParams, *, turns: int = 3
) -> Sample:
    """Draw up to `turns` turns: what a turn asks the calculator, the next one is told."""
    talk = Conversation(request)
    for _ in range(turns):
        turn = await talk.draw(engine, sampling_params)
        call = _CALL.search(request.text.decode(turn))
        if call is None or turn.finish_reason == "length":
            break
        said = f"{RESULT} {calculate(call[1])}"
        reply = request.reply(turn, [{"role": "user", "content": said}])
        if len(reply) >= talk.room:  # no turn would fit behind it
            break
        talk.add(reply)
    return talk.sample()


def answered(text: str, problem: Problem) -> float:
    """Return 1 where the last number behind all that the calculator said is the label, else 0."""
    _, was_told, after = text.rpartition(RESULT)
    return number_match(after.partition("\n")[2] if was_told else text, problem)


def _check(problem: Problem) -> None:
    CHECKS["number_match"](problem)


answered.check_problem = _check  # type: ignore[attr-defined]


def calculate(expression: str) -> str:
    """Return the value of sums, products and quotients of numbers, or what is wrong with them."""
    if len(expression) > MOST_CHARACTERS:
        return "that is too long"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
    except ZeroDivisionError:
        return "that divides by zero"
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return "that cannot be calculated"


def _value(node: ast.expr) -> Fraction:
    """Raises ValueError for anything but numbers and the four operations on them."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            found = Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            found = -_value(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            found = _OPERATORS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError("no number, and no operation on numbers")
    if max(abs(found.numerator), found.denominator) >= 10**MOST_DIGITS:
        raise ValueError("too large")
    return found
