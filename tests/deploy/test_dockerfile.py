"""deploy/Dockerfile: its instructions, and that what it takes from the project is there."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "ARG", "CMD"}


def instructions():
    """Each instruction and its words; lines that are continued are one."""
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line]


def words_of(instruction):
    return [words for name, words in instructions() if name == instruction]


def test_instructions_are_known():
    found = instructions()
    assert {name for name, _ in found} == KNOWN
    assert found[0][0] == "FROM"
    assert [name for name, _ in found].count("FROM") == 1


def test_all_that_is_packaged_is_copied_before_it_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = [source for words in words_of("COPY") for source in words.split()[:-1]]
    assert not [source for source in copied if not (ROOT / source).exists()]
    packages = project["tool"]["setuptools"]["packages"]
    needed = {package.split(".")[1] for package in packages}
    needed |= {"pyproject.toml", "constraints.txt", project["project"]["readme"]}
    needed |= set(project["project"]["license-files"])
    assert set(copied) == needed
    names = [name for name, _ in instructions()]
    *_, install = (i for i, (name, words) in enumerate(instructions()) if "-e " in words)
    assert "COPY" not in names[install:]


def test_versions_are_the_project_s():
    """CUDA is torch's, Python one that the project is for, extras are there."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[2:]
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [base] = words_of("FROM")
    assert base == f"nvidia/cuda:{pins['cuda-toolkit']}-base-ubuntu24.04"
    installs = [words for words in words_of("RUN") if "pip install" in words]
    assert all("pip install -c constraints.txt " in words for words in installs)
    assert installs[-1].endswith('-e ".[${EXTRAS}]"')
    [extras] = words_of("ARG")
    assert set(extras.removeprefix("EXTRAS=").split(",")) <= project["optional-dependencies"].keys()
    assert (ROOT / ".python-version").read_text().startswith("3.12")
    assert any("python3.12-venv" in words for words in words_of("RUN"))
