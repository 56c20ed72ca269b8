"""A random sample of cosmic-ray's mutants over the files where a wrong line is a wrong result.

A place in the code (an operator, a number, a condition, a keyword) is drawn first and then one of
the changes that cosmic-ray knows for it: otherwise the eleven replacements of each binary operator,
most of which crash, would be nearly all of the sample. Left out is what no result can show:
annotations, decorators, `==` made `is` and the like. A change that survives because it is none is
entered in sampled/equivalent.toml with the reason; it is not judged, and told beside the figure.
"""

import ast
import difflib
import random
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from mutants.table import FOLDER, ROOT

SEED = 20261128
SIZE = 240

FILES = (
    "rollout/runtime/scheduler.py",
    "rollout/runtime/prefix_cache.py",
    "rollout/runtime/sampler.py",
    "rollout/runtime/slots.py",
    "rollout/runtime/step_loop.py",
    "weight_sync/session.py",
    "weight_sync/digest.py",
    "weight_sync/mapping.py",
    "trainer/packing.py",
    "trainer/algorithms/base.py",
    "trainer/algorithms/grpo.py",
    "trainer/algorithms/sft.py",
    "trainer/stats.py",
    "trainer/checkpoint_writer.py",
    "recipes/grpo.py",
    "recipes/run/sampling.py",
    "recipes/run/training_metrics.py",
    "recipes/data/rewards.py",
    "recipes/data/order.py",
)

LEFT_OUT = ("NoOp", "RemoveDecorator", "_Is", "_IsNot")


@dataclass(frozen=True)
class SampledMutant:
    """One change: operator and occurrence are cosmic-ray's names for it."""

    file: str
    line: int
    column: int
    operator: str
    occurrence: int

    @property
    def name(self) -> str:
        """Unique in a sample."""
        return f"{self.file}:{self.line}:{self.column} {self.operator.partition('/')[2]}"

    def text(self, root: Path = ROOT) -> str:
        """The file with the change."""
        code = (root / self.file).read_text(encoding="utf-8")
        mutated = mutate_code(code, get_operator(self.operator)(), self.occurrence)
        assert mutated is not None, self.name
        return mutated

    def change(self, root: Path = ROOT) -> str:
        """The lines that differ, in one."""
        before = (root / self.file).read_text(encoding="utf-8").splitlines()
        found = list(difflib.ndiff(before, self.text(root).splitlines()))
        old, new = ([x[2:].strip() for x in found if x.startswith(sign)] for sign in "-+")
        return f"{' '.join(old)}  ->  {' '.join(new)}"


def _operators() -> list[str]:
    """Names of the operators without arguments that can show in a result."""
    names = [name for name in operator_names() if not get_operator(name).arguments()]
    return [n for n in names if not n.endswith(LEFT_OUT) and "_Is_" not in n and "_IsNot_" not in n]


def _annotations(code: str) -> set[tuple[int, int]]:
    """(line, column) of every node within an annotation or a decorator."""
    roots = []
    for node in ast.walk(ast.parse(code)):
        roots += [getattr(node, name, None) for name in ("annotation", "returns")]
        roots += getattr(node, "decorator_list", ())
    inside = (n for root in roots if root is not None for n in ast.walk(root))
    spans = [n for n in inside if isinstance(n, ast.expr)]
    return {
        (line, column)
        for n in spans
        for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)
        for column in range(
            n.col_offset if line == n.lineno else 0,
            n.end_col_offset if line == n.end_lineno and n.end_col_offset else 200,
        )
    }


def all_mutants(file: str, root: Path = ROOT) -> dict[tuple[int, int], list[SampledMutant]]:
    """Every mutant of a file, by place."""
    code = (root / file).read_text(encoding="utf-8")
    tree, annotations, rows = get_ast(code), _annotations(code), code.splitlines()
    nodes = list(ast_nodes(tree))
    found: dict[tuple[int, int], list[SampledMutant]] = defaultdict(list)
    for name in _operators():
        operator = get_operator(name)()
        places = (start for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, (line, column) in enumerate(places):
            keyword_only = rows[line - 1][column:].startswith("*, ")  # no product
            if (line, column) not in annotations and not keyword_only:
                found[line, column].append(SampledMutant(file, line, column, name, occurrence))
    return found


def draw(size: int, seed: int, root: Path = ROOT) -> list[SampledMutant]:
    """`size` different places of all files, and for each a change that compiles."""
    rng = random.Random(seed)
    places = [group for file in FILES for _, group in sorted(all_mutants(file, root).items())]
    drawn: list[SampledMutant] = []
    for group in rng.sample(places, len(places)):
        for mutant in rng.sample(group, len(group)):
            if len(drawn) < size and _compiles(mutant, root):
                drawn.append(mutant)
                break
    return drawn


def equivalents(mutants: list[SampledMutant], root: Path = ROOT) -> dict[str, str]:
    """{name: reason} of those that sampled/equivalent.toml knows: by file and change and, where
    other lines read the same, by the line `after` which it stands."""
    text = (FOLDER / "sampled" / "equivalent.toml").read_text(encoding="utf-8")
    known = tomllib.loads(text)["equivalent"]
    found = {}
    for mutant in mutants:
        before = (root / mutant.file).read_text(encoding="utf-8").splitlines()[mutant.line - 2]
        place = {"file": mutant.file, "change": mutant.change(root), "after": before.strip()}
        for entry in known:
            if all(place[key] == value for key, value in entry.items() if key != "reason"):
                found[mutant.name] = entry["reason"]
    return found


def _compiles(mutant: SampledMutant, root: Path) -> bool:
    try:
        compile(mutant.text(root), mutant.file, "exec")
    except SyntaxError:
        return False
    return True
