"""The tables of tests/mutants/ fit the code and the tests that they name."""

import ast
import functools
from pathlib import Path

import pytest
from mutants.table import ROOT, SemanticMutant, tables

from samebit.kernels.gpu.vmm import build

ALL = [mutant for entries in tables().values() for mutant in entries]


@functools.cache
def functions_of(file: str) -> set[str]:
    """Names of the tests of a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_an_entry_fits(mutant: SemanticMutant, tmp_path: Path):
    if mutant.file.endswith(".c"):
        (source := tmp_path / "lie.c").write_text(mutant.text())
        build(source)
    else:
        compile(mutant.text(), mutant.file, "exec")
    for test in mutant.killed_by:
        file, _, function = test.partition("::")
        assert function.partition("[")[0] in functions_of(file), f"there is no {test}"


def test_there_are_enough():
    assert sum(not mutant.equivalent for mutant in ALL) >= 100
