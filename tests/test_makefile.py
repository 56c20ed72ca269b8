"""What `make` runs and shows: no GPU for the tests, and an installation that can be watched."""

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")

# In place of the environment's Python: says what it was given, and prints what pip prints.
PIP = r"""#!/usr/bin/env bash
echo "$*" >> "$(dirname "$0")/../arguments"
[[ $* == "-m pip"* ]] || exit 0
cat <<'LINES'
Collecting torch<2.12,>=2.11 (from samebit==0.1.0)
  Downloading torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl.metadata (29 kB)
Requirement already satisfied: tqdm in ./lib (4.70.1)
  Downloading torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl (821.0 MB)
  Downloading tqdm-4.70.1-py3-none-any.whl (78 kB)
  Downloading scipy-1.18.1-cp312-cp312-manylinux_2_28_x86_64.whl (33.5 MB)
  Using cached nvidia_x-1.0-py3-none-any.whl (1.2 GB)
  Building wheel for antlr4-python3-runtime (pyproject.toml): started
  Building wheel for antlr4-python3-runtime (pyproject.toml): finished with status 'done'
Installing collected packages: torch, tqdm, nvidia-x
Successfully installed torch-2.11.0 tqdm-4.70.1 nvidia-x-1.0
LINES
if [[ -n ${FAILS:-} ]]; then echo "ERROR: no space left" >&2; exit 1; fi
"""


def environment(**changes):
    """Of a user's shell: nothing of a make that runs these tests."""
    of_make = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "SYSTEM_SITE", "EXTRAS", "PYTHON", "ARGS"}
    return {k: v for k, v in os.environ.items() if k not in of_make} | changes


@pytest.fixture
def venv(tmp_path):
    """An environment whose Python is PIP."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP)
    python.chmod(0o755)
    return python.parents[1]


def setup_of(venv):
    return ["make", "--no-print-directory", "-C", str(ROOT), "setup", f"VENV={venv}"]


@pytest.mark.parametrize("command", [["make", "-n", "test"], [".ci/run"]], ids=" ".join)
def test_the_tests_see_no_gpu(command):
    """Neither by `make test` nor by what CI runs."""
    settings = environment(MAKEFLAGS="n") if command == [".ci/run"] else environment()
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (tests,) = (line for line in run.stdout.splitlines() if "pytest" in line)
    hidden = tests.split(".venv")[0].split()
    assert {"CUDA_VISIBLE_DEVICES=", "HIP_VISIBLE_DEVICES="} <= set(hidden)


def test_an_installation_that_is_not_watched_prints_short_lines(venv):
    """What takes long, as it begins; a second time nothing."""
    run = subprocess.run(setup_of(venv), env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    phase = [
        "  Downloading torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl (821.0 MB)",
        "  Using cached nvidia_x-1.0-py3-none-any.whl (1.2 GB)",
        "  Building antlr4-python3-runtime",
        "  Installing 3 packages",
    ]
    assert run.stdout.splitlines() == [
        "Installing samebit[demo,ray,dev] and torch: about 6 GB and minutes the first time.",
        *phase,
        "Installing the demo's weights (93 MB).",
        *phase,
        f"{venv} is ready.",
    ]
    again = subprocess.run(setup_of(venv), env=environment(), capture_output=True, text=True)
    assert "Installing" not in again.stdout


def test_a_failed_installation_says_why_and_is_tried_again(venv):
    settings = environment(FAILS="1")
    run = subprocess.run(setup_of(venv), env=settings, capture_output=True, text=True)
    assert run.returncode != 0
    assert "ERROR: no space left" in run.stderr
    assert "is ready" not in run.stdout
    assert subprocess.run(setup_of(venv), env=environment(), capture_output=True).returncode == 0


def test_on_a_terminal_pip_shows_its_own_bars(venv):
    ours, theirs = pty.openpty()
    with subprocess.Popen(setup_of(venv), env=environment(), stdout=theirs) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
    os.close(ours)
    assert process.returncode == 0
    assert b"Collecting torch" in shown
    given = (venv / "arguments").read_text()
    assert "-m pip install -c constraints.txt -e .[demo,ray,dev]\n" in given
    assert "--quiet" not in given
    assert "--progress-bar" not in given


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # its other end is closed
        return b""
