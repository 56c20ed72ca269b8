"""The documents are true where a program can tell: links, names, constants, figures, commands."""

import json
import re
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\[[^]]*\]\(([^)#\s]*)(#[^)\s]*)?\)")
FOLDERS = "kernels|rollout|weight_sync|trainer|recipes|configs|deploy|tests|docs"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*[\w/]")
NAME_IN_FILE = re.compile(r"`(\w+)` in \[[^]]*\]\(([^)#]+)\)|\]\(([^)#]+\.py)\) `(\w+)`")


def expect_none(found):
    assert not found, "\n" + "\n".join(found)


def label(page):
    return page.relative_to(ROOT).as_posix()


def prose(page):
    """The page without its blocks of code, whose comments look like headings."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Of the headings, as the usual public forges make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def rows(text, columns):
    """Cells of the rows of tables that have so many columns."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines if len(cells) == columns]


def test_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        for target, anchor in LINK.findall(page.read_text()):
            file = (page.parent / target).resolve() if target else page
            if not file.exists():
                wrong.append(f"{label(page)}: {target} does not exist")
            elif anchor and anchor[1:] not in anchors(file):
                wrong.append(f"{label(page)}: {target} has no heading {anchor}")
    expect_none(wrong)


def test_files_that_are_named_exist():
    """Also in comments and docstrings of the code, where they name a document."""
    folders = (folder for folder in FOLDERS.split("|") if folder != "tests")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    cited = [(page, PATH.findall(page.read_text())) for page in PAGES]
    cited += [(file, re.findall(r"docs/[\w./-]*[\w/]", file.read_text())) for file in code]
    expect_none(
        [
            f"{label(file)}: {name} does not exist"
            for file, names in cited
            for name in names
            if not (ROOT / name).exists()
        ]
    )


def test_names_stand_in_the_files_that_are_given_for_them():
    wrong = []
    for page in PAGES:
        for name, target, other, other_name in NAME_IN_FILE.findall(page.read_text()):
            file = page.parent / (target or other)
            if not re.search(rf"\b{name or other_name}\b", file.read_text()):
                wrong.append(f"{label(page)}: {file.name} has no {name or other_name}")
    expect_none(wrong)


def test_types_stand_in_the_files_that_are_given_for_them():
    wrong = []
    for names, _, file in rows((ROOT / "docs" / "design.md").read_text(), 3):
        for name in re.findall(r"`(\w+)`", names) if file.endswith(".py") else ():
            if f"class {name}" not in (ROOT / file).read_text():
                wrong.append(f"{file} has no class {name}")
    expect_none(wrong)


def test_every_result_has_its_row_with_its_commit():
    text = (ROOT / "docs" / "results.md").read_text()
    linked = set(re.findall(r"\]\(results/([\w.]+)", text))
    files = {path.name for path in RESULTS.iterdir()}
    expect_none([f"{name} has no row" for name in sorted(files - linked)])
    wrong = []
    for line in text.splitlines():
        for name in re.findall(r"\]\(results/([\w.]+\.json)\)", line):
            commit = line.rstrip(" |").split("|")[-1].strip()
            if not json.loads((RESULTS / name).read_text())["commit"].startswith(commit):
                wrong.append(f"{name} is not of {commit}")
    expect_none(wrong)


def test_speeds_are_those_of_the_files():
    """Of the README's table and of the same one in docs/results.md."""
    readme = rows((ROOT / "README.md").read_text(), 3)
    results = [cells[:3] for cells in rows((ROOT / "docs" / "results.md").read_text(), 6)]
    shapes = [cells for cells in readme if cells[0].startswith("Qwen3")]
    assert shapes
    assert [cells for cells in results if cells[0].startswith("Qwen3")] == shapes
    for shape, workload, speed in shapes:
        found = json.loads(
            (RESULTS / f"h200_engine_{shape.lower().replace('-', '_')}.json").read_text()
        )
        key = "x".join(re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d)", "", workload)))
        measured = found["variants"]["default"]["workloads"][key]["output_tokens_s"]["median"]
        assert f"{measured:,.0f}" == speed, (shape, workload)


def test_constants_are_those_of_the_code():
    from samebit.kernels import contract, profile

    wrong, text = [], (ROOT / "docs" / "contract.md").read_text()
    for _, gpu, cpu, where in rows(text, 4):
        names = re.findall(r"`([A-Z_]+)`", where)
        said = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", f"{gpu} {cpu}") if names]
        values = [getattr(contract, name) for name in names]
        if said not in (values, 2 * values):
            wrong.append(f"{names} are {values}; the page says {said}")
    expect_none(wrong)
    assert f"describes contract version {contract.CONTRACT_VERSION}." in text
    for field in fields(profile.NumericsProfile):
        assert f"`{field.name}`" in text


def test_commands_are_those_that_there_are():
    from samebit.recipes.cli.commands import COMMANDS

    named = set(re.findall(r"^samebit ((?:bench )?[\w-]+)", (ROOT / "README.md").read_text(), re.M))
    named |= set(re.findall(r"; samebit ((?:bench )?[\w-]+)", (ROOT / "README.md").read_text()))
    assert named == COMMANDS.keys()


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_pages_are_plain_text():
    expect_none([label(page) for page in PAGES if not page.read_text().isascii()])
