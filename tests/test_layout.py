"""The layout rules of the repository, held by reading every source file: who may import whom, which
packages there are, how long things may get, and what stays out of the code altogether."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE_FOLDERS = ("kernels", "rollout", "weight_sync", "trainer", "recipes")
DATA_FOLDERS = ("configs",)

# What each folder may import from samebit, besides itself.
MAY_IMPORT = {
    "kernels": (),
    "weight_sync": (),
    "rollout": ("samebit.kernels", "samebit.weight_sync"),
    "trainer": (
        "samebit.kernels",
        "samebit.weight_sync",
        "samebit.rollout.types",
        "samebit.rollout.models",
    ),
    "recipes": ("samebit",),
}
# Where a third-party package may be imported: folders end in "/". Tests may import anything.
ONLY_IN = {
    "megatron": ("trainer/megatron/",),
    "ray": tuple(
        f"recipes/launch/ray_{name}.py"
        for name in ("cluster", "connections", "engines", "jobs", "rank", "ranks")
    ),
    "transformers": ("rollout/models/config.py", "recipes/"),
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# "path::function" -> why it may be longer.
LONG_FUNCTIONS = {
    "kernels/gpu/hopper_tiles.py::attend_tiles": "one software pipeline: its steps share all values"
}


def code_files() -> list[Path]:
    return sorted(path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def all_files() -> list[Path]:
    return code_files() + sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def expect_none(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def hold(files: list[Path], check) -> None:
    """Fails with every (node, message) pair that `check(path, tree)` yields for the files."""
    expect_none(
        [
            f"{name_of(path)}:{getattr(node, 'lineno', 1)}: {message}"
            for path in files
            for node, message in check(path, parse(path))
        ]
    )


def imports(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every imported dotted name, wherever it stands: also under TYPE_CHECKING, in a function, and
    as the literal argument of import_module. `from a import b` gives "a.b"."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                prefix = "." * level + (module or "")
                yield from ((node, f"{prefix}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node, name


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_imports_follow_the_directions():
    def check(path, tree):
        folder = path.relative_to(ROOT).parts[0]
        allowed = (f"samebit.{folder}", *MAY_IMPORT[folder])
        for node, name in imports(tree):
            if is_within(name, "samebit") and not any(is_within(name, a) for a in allowed):
                yield node, f"{folder} may not import {name}"

    hold(code_files(), check)


def test_megatron_and_transformers_stay_in_their_places():
    def check(path, tree):
        for node, name in imports(tree):
            places = ONLY_IN.get(name.split(".")[0])
            if places and not any(
                name_of(path).startswith(p) if p.endswith("/") else name_of(path) == p
                for p in places
            ):
                yield node, f"{name} may be imported only in {', '.join(places)}"

    hold(code_files(), check)


def test_imports_are_absolute_and_under_samebit():
    def check(path, tree):
        for node, name in imports(tree):
            if name.startswith("."):
                yield node, f"relative import {name}"
            elif name.split(".")[0] in (*CODE_FOLDERS, *DATA_FOLDERS, "tests"):
                yield node, f"import samebit.{name}, not the root folder {name}"

    hold(all_files(), check)


def imported_files(path: Path) -> set[str]:
    """The project's other files that a file imports: also under TYPE_CHECKING, in a function, and
    by a text "module" or "module:function", as Op takes. A process that is started is none."""
    tree = parse(path)
    names, started = [name for _, name in imports(tree)], set()
    for node in ast.walk(tree):
        match node:
            case ast.List(elts=items):
                texts = [item.value if isinstance(item, ast.Constant) else "" for item in items]
                started |= {items[i + 1] for i, text in enumerate(texts[:-1]) if text == "-m"}
            case ast.Constant(value=str(text)) if node not in started:
                names.append(text.split(":")[0])
    places = [name.split(".")[1:] for name in names if name.startswith("samebit.")]
    # Of `from samebit.a.b import c` the last part may be a module or a name in one.
    files = {"/".join(parts) + ".py" for place in places for parts in (place, place[:-1])}
    return {file for file in files if (ROOT / file).is_file()} - {name_of(path)}


def import_cycles() -> frozenset[frozenset[str]]:
    """Every largest group of files that reach each other."""
    graph = {name_of(path): imported_files(path) for path in code_files()}

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reach = {name: reachable(name) for name in graph}
    return frozenset(
        frozenset(other for other in reach[name] if name in reach[other])
        for name in graph
        if name in reach[name]
    )


def test_no_file_imports_itself_by_way_of_others():
    """An import that is put off, into a function or a text, hides a cycle and does not end it."""
    expect_none([f"cycle: {' '.join(sorted(cycle))}" for cycle in import_cycles()])


# What every file of kernels/ may import.
KERNEL_LEAVES = {
    f"kernels/{name}.py"
    for name in (
        *("attention_kind", "contract", "decode_ring", "deterministic", "op"),
        *("shared_prefixes", "transfer"),
    )
}


def test_implementations_of_kernels_know_nothing_of_their_dispatch():
    """They import the leaves and each other; the leaves import only leaves."""
    for path in (ROOT / "kernels").rglob("*.py"):
        found, folder = imported_files(path), name_of(path.parent)
        if name_of(path) in KERNEL_LEAVES:
            assert found <= KERNEL_LEAVES, name_of(path)
        elif folder != "kernels":
            strangers = {f for f in found - KERNEL_LEAVES if not f.startswith(f"{folder}/")}
            assert not strangers, name_of(path)


def test_packages_in_pyproject_are_the_folders():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = project["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in code_files()} | {ROOT / folder for folder in DATA_FOLDERS}
    found = {"samebit." + name_of(folder).replace("/", ".") for folder in folders}
    expect_none([f"declared twice: {name}" for name in set(declared) if declared.count(name) > 1])
    expect_none([f"not in pyproject.toml: {name}" for name in sorted(found - set(declared))])
    expect_none([f"holds no module: {name}" for name in sorted(set(declared) - found)])


def test_data_beside_the_code_is_packaged():
    """Shapes alone, for benchmarks in a checkout, are in no installed package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packaged = set()
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        found = [path for pattern in patterns for path in folder.glob(pattern)]
        assert found, package
        packaged.update(found)
    files = [path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.*")]
    data = {p for p in files if p.suffix not in (".py", ".pyc") and "shapes" not in p.parts}
    expect_none([name_of(path) for path in data - packaged])


# What packages are called on the index where it is not the name that is imported.
DISTRIBUTIONS = {
    "flashinfer": "flashinfer-python",
    "yaml": "pyyaml",
    "hydra": "hydra-core",
    "megatron": "megatron-core",
}
# Declared without an import of ours, and why.
NOT_IMPORTED = {
    "gguf": "transformers reads the demo's weights with it",
    "accelerate": "transformers reads the demo's weights with it",
    "pytest-xdist": "pytest's option -n",
    "pytest-timeout": "pytest's option timeout",
    "ruff": "a command",
    "mypy": "a command",
}


def declared_dependencies() -> dict[str, set[str]]:
    """Names of distributions by extra; "" has those that are always installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines}
        for extra, lines in groups.items()
    }


def imported_distributions(files: list[Path]) -> dict[str, str]:
    """What third-party packages the files import, and where."""
    tests = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("*.py")]
    local = {"samebit", *(name.removesuffix(".py") for path in tests for name in path.parts)}
    found = {}
    for path in files:
        for node, dotted in imports(parse(path)):
            name = dotted.split(".")[0]
            if name not in sys.stdlib_module_names | local:
                distribution = DISTRIBUTIONS.get(name, name).replace("_", "-")
                found[distribution] = f"{name_of(path)}:{node.lineno}"
    return found


def test_what_is_imported_is_declared():
    """And what is declared is imported, or it says why not."""
    declared, ours = declared_dependencies(), imported_distributions(code_files())
    everything = set().union(*declared.values())
    expect_none([f"{ours[n]}: {n} is not declared" for n in ours.keys() - everything])
    expect_none([f"{ours[n]}: {n} is dev's alone" for n in ours.keys() & declared["dev"]])
    tests = imported_distributions(all_files())
    expect_none([f"{tests[n]}: {n} is not declared" for n in tests.keys() - everything])
    unused = everything - tests.keys() - NOT_IMPORTED.keys()
    expect_none([f"{name} is declared and not imported" for name in unused])
    expect_none(
        [f"{n} needs no exemption" for n in NOT_IMPORTED if n in ours or n not in everything]
    )


def test_versions_that_bits_depend_on_are_bounded():
    """And constraints.txt pins every dependency, within the bounds."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = (project["dependencies"], *project["optional-dependencies"].values())
    wanted = {r.name.lower(): r.specifier for r in map(Requirement, sum(groups, []))}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    expect_none([f"{n} is not pinned in constraints.txt" for n in wanted.keys() - pins.keys()])
    expect_none(
        [f"{n}=={pins[n]} is not within {s}" for n, s in wanted.items() if pins[n] not in s]
    )
    for name in ("torch", "triton", "megatron-core"):
        assert {s.operator for s in wanted[name]} == {">=", "<"}, name


def test_no_init_files():
    """A root package called `kernels` would shadow the one that transformers imports."""
    folders = (*CODE_FOLDERS, *DATA_FOLDERS, "tests")
    expect_none([name_of(p) for folder in folders for p in (ROOT / folder).rglob("__init__.py")])


def test_every_module_has_a_docstring():
    def check(path, tree):
        if not ast.get_docstring(tree):
            yield tree, "no module docstring"

    hold(all_files(), check)


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in all_files()}
    expect_none([f"{name}: {n} lines" for name, n in lengths.items() if n > MAX_FILE_LINES])


def test_functions_are_short():
    long = {}
    for path in all_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{name_of(path)}::{node.name}"] = lines
    expect_none([f"{name}: {n} lines" for name, n in long.items() if name not in LONG_FUNCTIONS])
    expect_none([f"{name}: no longer needs its exemption" for name in LONG_FUNCTIONS.keys() - long])


def test_no_global_statements():
    def check(path, tree):
        yield from ((n, "global") for n in ast.walk(tree) if isinstance(n, ast.Global))

    hold(all_files(), check)


@pytest.mark.parametrize("arguments", [["--help"], ["grpo", "--help"]], ids=" ".join)
def test_help_imports_no_torch(arguments):
    script = f"""
import sys
from samebit.recipes.cli.main import main
try:
    status = main({arguments!r})
except SystemExit as stop:
    status = stop.code
heavy = {{"torch", "transformers", "megatron", "ray"}} & set(sys.modules)
sys.exit(f"imported {{sorted(heavy)}}" if heavy else status)
"""
    command = [sys.executable, "-P", "-c", script]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
