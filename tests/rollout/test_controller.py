"""The program that measures the controller's own work: a real pool, replicas without a model."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "programs" / "controller.py"


def test_what_the_controller_costs_is_measured(tmp_path):
    out = tmp_path / "controller.json"
    options = ["replicas=5", "room=4", "samples=48", "per_prompt=1,4", "prompt_tokens=9"]
    command = [sys.executable, PROGRAM, out, *options, "new_tokens=3", "repeats=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["samples_per_prompt"], row["requests"]) for row in rows] == [(1, 48), (4, 12)]
    assert all(0 < row["ms_per_1000_min"] <= row["ms_per_1000"] for row in rows)
    assert "ms_per_1000" in done.stdout


def test_an_unknown_option_is_named(tmp_path):
    command = [sys.executable, PROGRAM, tmp_path / "out.json", "replica=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "'replica' is none of replicas, room" in done.stderr
