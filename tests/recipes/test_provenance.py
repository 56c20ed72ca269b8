"""What a result says of its origin comes from the program, and can be found again."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch
from programs import source_digest as source_digest_program

from samebit.recipes.run import provenance as module
from samebit.recipes.run.provenance import (
    ROOT,
    committed_files,
    program_files,
    provenance,
    record_start,
    source,
    source_digest,
)

CPU = torch.device("cpu")
PROGRAM = {
    "kernels/a.py": "a = 1\n",
    "kernels/gpu/tables/card.json": "{}\n",
    "recipes/bench/b.py": "b = 1\n",
    "recipes/run/page.html.jinja": "<p>{{ a }}</p>\n",
    "configs/demo.yaml": "c: 1\n",
}
BESIDE = {
    "README.md": "words\n",
    "tests/test_a.py": "assert True\n",
    "docs/results/card.json": "{}\n",
    "recipes/bench/shapes/tiny/config.json": "{}\n",
    "recipes/bench/shapes/tiny/notes.yaml": "c: 1\n",
}


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def checkout(tmp_path):
    """A small repository of the same layout, all of it committed."""
    folder = tmp_path / "checkout"
    write(folder, PROGRAM | BESIDE)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "one")
    return folder


def found_in(folder):
    return source(folder, program_files(folder))


def test_a_clean_checkout_is_its_commit(checkout, tmp_path):
    """And a copy without history has the same digest, wherever it lies."""
    found = found_in(checkout)
    assert found["commit"] == git(checkout, "rev-parse", "--short=12", "HEAD")
    assert found["changed_files"] == []
    assert program_files(checkout).keys() == PROGRAM.keys()
    assert source_digest(committed_files("HEAD", checkout)) == found["source_digest"]
    copy = shutil.copytree(checkout, tmp_path / "elsewhere", ignore=lambda *_: [".git"])
    assert found_in(copy) == found | {"commit": "unknown", "changed_files": None}


def test_every_change_of_the_program_is_named(checkout):
    """Edited, removed, added without git's knowledge; what is no part of the program is not."""
    before = found_in(checkout)["source_digest"]
    write(checkout, dict.fromkeys(BESIDE, "other\n"))
    (checkout / ".gitignore").write_text("hidden.py\n")
    assert found_in(checkout)["changed_files"] == []
    write(checkout, {"kernels/a.py": "a = 2\n", "recipes/hidden.py": "", "configs/new.yaml": ""})
    (checkout / "recipes/bench/b.py").unlink()
    git(checkout, "update-index", "--assume-unchanged", "kernels/a.py")
    found = found_in(checkout)
    assert found["changed_files"] == [
        "configs/new.yaml",
        "kernels/a.py",
        "recipes/bench/b.py",
        "recipes/hidden.py",
    ]
    assert found["source_digest"] != before


def test_a_commit_of_another_repository_is_not_claimed(checkout):
    """A package that lies in a folder of somebody's repository, such as its .venv."""
    installed = checkout / ".venv" / "samebit"
    write(installed, PROGRAM)
    found = found_in(installed)
    assert (found["commit"], found["changed_files"]) == ("unknown", None)
    assert found["source_digest"] == found_in(checkout)["source_digest"]


def test_no_environment_variable_names_the_commit(checkout, monkeypatch):
    found = found_in(checkout)
    for name in ("SAMEBIT_COMMIT", "GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.setenv(name, "/nowhere")
    assert found_in(checkout) == found


def test_a_digest_leads_to_its_commits(checkout, tmp_path, capsys):
    """Also after the program has changed; and the commit leads to the digest."""
    digest = found_in(checkout)["source_digest"]
    first = git(checkout, "rev-parse", "HEAD")
    write(checkout, {"kernels/a.py": "a = 2\n"})
    git(checkout, "commit", "--quiet", "--all", "--message", "two")
    assert source_digest_program.main(digest, root=checkout) == 0
    assert capsys.readouterr().out == f"{first}\n"
    assert source_digest_program.main("HEAD~1", root=checkout) == 0
    assert capsys.readouterr().out == f"{digest}\n"
    assert source_digest_program.main("0" * 64, root=checkout) == 1
    assert "no commit has the source digest 000" in capsys.readouterr().out
    assert source_digest_program.main("nowhere", root=checkout) == 1
    assert capsys.readouterr().err.startswith("'nowhere' is no commit: ")
    assert source_digest_program.main("HEAD", root=tmp_path) == 1
    assert capsys.readouterr().err == f"{tmp_path} holds no history to look for 'HEAD' in\n"
    assert source_digest_program.main(None, root=checkout) == 0
    assert json.loads(capsys.readouterr().out) == found_in(checkout)


def test_this_tree_is_what_git_says(tmp_path):
    """HEAD's files by git against those of HEAD in a folder of their own."""
    if module.head(ROOT) is None:
        pytest.skip("no history here")
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(tmp_path, filter="data")
    assert program_files(tmp_path) == committed_files("HEAD", ROOT)
    assert "recipes/run/provenance.py" in program_files(tmp_path)


def test_an_edit_while_the_program_runs_is_not_what_ran(checkout):
    started_as = program_files(checkout)
    write(checkout, {"kernels/a.py": "a = 2\n"})
    assert source(checkout, started_as)["changed_files"] == []
    git(checkout, "commit", "--quiet", "--all", "--message", "two")
    assert source(checkout, started_as)["changed_files"] == ["kernels/a.py"]


def test_versions_are_of_what_is_imported(monkeypatch):
    """Not of what is installed; megatron's without the commit of the repository it lies in."""
    for name, version in (("transformers", "0.1"), ("megatron.core", "0.19.2+62d53b3")):
        fake = types.ModuleType(name)
        fake.__version__ = version
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    versions = provenance(["x"], CPU)["versions"]
    assert versions["torch"] == torch.__version__
    assert (versions["transformers"], versions["megatron-core"]) == ("0.1", "0.19.2")
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"reasoning-gym", "driver", "nccl"}.isdisjoint(versions)


def test_the_device_is_the_one_that_was_used(monkeypatch):
    """A run on the CPU of a machine with a GPU says the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    on_cpu = provenance(["x"], CPU)
    assert on_cpu["device"] == on_cpu["hardware"]["cpu"] != "NVIDIA H200"
    assert on_cpu["hardware"] == {"device": "cpu", "cpu": on_cpu["device"], "processes": 1}
    assert module._hardware(torch.device("cuda", 3)) == {
        "device": "cuda:3", "cpu": on_cpu["device"], "gpus_visible": 8, "processes": 1
    }  # fmt: skip
    assert module.device_name(torch.device("cuda", 3)) == "NVIDIA H200"


def test_modules_of_another_tree_are_named(monkeypatch, tmp_path):
    assert "imported_from_elsewhere" not in provenance(["x"], CPU)
    stray = types.ModuleType("samebit.kernels.stray")
    stray.__file__ = str(tmp_path / "stray.py")
    monkeypatch.setitem(sys.modules, stray.__name__, stray)
    assert provenance(["x"], CPU)["imported_from_elsewhere"] == [stray.__file__]


def test_a_command_can_be_typed_again():
    arguments = ["samebit", "bench", "workloads=[1x1x4x2, 2x1x4x2]", "run_name=it's"]
    text = provenance(arguments, CPU)["command"]
    assert text == """samebit bench 'workloads=[1x1x4x2, 2x1x4x2]' 'run_name=it'"'"'s'"""


def test_every_start_of_a_run_is_recorded(tmp_path):
    record_start(tmp_path, CPU, 0)
    record_start(tmp_path, CPU, 7)
    lines = (tmp_path / "provenance.jsonl").read_text().splitlines()
    assert [json.loads(line)["after_step"] for line in lines] == [0, 7]
    assert json.loads(lines[1])["source_digest"] == source_digest(module.STARTED_AS)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["provenance.jsonl"]
