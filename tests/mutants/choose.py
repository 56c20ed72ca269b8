"""Which tests to run against a changed line: those that reach it, the cheapest first."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

from mutants.judge import Round
from mutants.table import ROOT

FIRST_ROUND_S = 10.0
BUDGET_S = 80.0
"""Of tests for one mutant, in seconds that they took without it. What lives longer has survived."""


@dataclass(frozen=True)
class Reached:
    """A test, and the lines that it reached."""

    name: str
    seconds: float
    fixtures: tuple[str, ...]
    lines: dict[str, frozenset[int]]


class Reach:
    """All that the tests reached, from the files of the pytest plugin `reach`."""

    def __init__(self, folder: Path) -> None:
        self.tests: list[Reached] = []
        self._fixtures: dict[str, float] = {}
        for path in sorted(folder.glob("*.json")):
            found = json.loads(path.read_text())
            self._fixtures |= found["fixtures"]
            self.tests += [
                Reached(
                    name=name,
                    seconds=test["seconds"],
                    fixtures=tuple(test["fixtures"]),
                    lines={file: frozenset(lines) for file, lines in test["lines"].items()},
                )
                for name, test in found["tests"].items()
            ]
        self.tests.sort(key=self._alone)

    def _alone(self, test: Reached) -> float:
        """Seconds of a test that runs alone."""
        return test.seconds + sum(self._fixtures[name] for name in test.fixtures)

    def rounds(self, file: str, line: int) -> list[Round]:
        """The tests of a line: first one of each function as far as ten seconds go, then others."""
        lines = statement_lines((ROOT / file).read_text(encoding="utf-8"), line)
        if lines is None:
            reaching = [t for t in self.tests if file in t.lines]
        else:
            reaching = [t for t in self.tests if lines & t.lines.get(file, frozenset())]
        functions: set[str] = set()
        first = []
        for test in reaching:
            if (function := test.name.partition("[")[0]) not in functions:
                functions.add(function)
                first.append(test)
        begun = self._affordable(first, FIRST_ROUND_S)
        names = {test.name for test in begun}
        rest = self._affordable([t for t in reaching if t.name not in names], BUDGET_S)
        return [
            Round(tuple((test.name, self._alone(test)) for test in part))
            for part in (begun, rest)
            if part
        ]

    def _affordable(self, tests: list[Reached], budget: float) -> list[Reached]:
        """The first of them that take so long together, at least one; a fixture counts once."""
        chosen: list[Reached] = []
        made: set[str] = set()
        for test in tests:
            new = set(test.fixtures) - made
            budget -= test.seconds + sum(self._fixtures[name] for name in new)
            if budget < 0 and chosen:
                break
            made |= new
            chosen.append(test)
        return chosen


def statement_lines(code: str, line: int) -> set[int] | None:
    """Lines of the statement (of a compound one: its head) that holds a line of a function's body.

    None for what is executed at import: constants, defaults, fields of classes.
    """
    inside, in_function = None, False
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.stmt | ast.ExceptHandler):
            continue
        if node.lineno <= line <= (node.end_lineno or 0):
            inside = node  # ast.walk goes outwards in: the last one is the innermost
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                in_function = in_function or line > _head_end(node)
    if inside is None or not in_function:
        return None
    return set(range(inside.lineno, max(_head_end(inside), line) + 1))


def _head_end(node: ast.stmt | ast.ExceptHandler) -> int:
    """The last line before a compound statement's body; of another one its last."""
    body = getattr(node, "body", None)
    return max(body[0].lineno - 1, node.lineno) if body else node.end_lineno or node.lineno
